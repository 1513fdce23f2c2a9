"""Compiled layers in training, evaluation and sampling (dalle/compile.py)."""

import pytest
import torch

from dalle.compile import VARIANTS, compile_layers, compiled
from dalle.dvae.model import Conv2d
from dalle.precision import tf32
from dalle.transformer.generate import generate
from dalle.transformer.losses import cross_entropies
from tests.helpers.small_transformer import ids_of, small, text_of


@pytest.mark.slow
def test_a_function_is_compiled_once_with_room_for_all_its_shapes():
    function = compiled(torch.sin)
    assert function is compiled(torch.sin)
    assert torch._dynamo.config.recompile_limit >= VARIANTS
    with torch._dynamo.config.patch(recompile_limit=100):
        compile_layers(torch.nn.Sequential(torch.nn.ReLU()))
        assert torch._dynamo.config.recompile_limit == 100


@pytest.mark.slow  # importing torch._dynamo takes longer
def test_a_convolution_in_full_precision_is_compiled_as_one_graph():
    torch.manual_seed(0)
    conv, x = Conv2d(3, 4, 1, full_precision=True), torch.rand(2, 3, 4, 4)
    compiled_conv = torch.compile(conv, backend="eager", fullgraph=True)
    with tf32(True), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled_conv(x), conv(x))
        assert compiled_conv(x).dtype == torch.float32


@pytest.mark.slow
def test_evaluations_of_all_sizes_and_samples_leave_every_layer_compiled():
    """Of each of three kinds a graph for training, the first size evaluated, all others, and 1."""
    torch.compiler.reset()
    model = small(3)
    compile_layers(model, backend="eager")
    ids, graphs = ids_of(model).repeat(2, 1), []
    torch._dynamo.utils.counters.clear()

    def evaluate(size):
        with torch.no_grad():
            cross_entropies(model, ids[:size])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            sum(cross_entropies(model, ids)).backward()
            for size in (8, 4, 5, 3, 7, 2, 1):
                evaluate(size)
            for captions in (1, 2, 3):
                generate(model, text_of(model, captions), torch.rand(captions, 2, 16, dtype=torch.float64))
    assert graphs == [6, 9, 9, 9, 9, 9, 12] + 7 * [12]
    assert not torch._dynamo.utils.counters["graph_break"]
