"""Sampling on CUDA: tokens of the CPU, graphs, number formats, memory, models that move and are saved."""

import pytest
import torch

from dalle.pipelines import best_of_n
from dalle.pipelines.dalle import DALLE
from dalle.transformer.generate import CUDAGraphStep, decode_step_of
from tests.helpers.pretended_cuda import CUDA, only_real, pretended_slowly
from tests.pipelines.test_dalle import CAPTIONS, generate, tokens_of


@pytest.fixture
def on_cpu(dalle) -> DALLE:
    """A model whose logits depend on everything."""
    with torch.no_grad():
        dalle.transformer.to_logits.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return dalle


@pytest.fixture
def there(on_cpu, cuda) -> DALLE:
    """Its copy on the device."""
    return DALLE(on_cpu.dvae, on_cpu.transformer, on_cpu.text, on_cpu.scorer).to(cuda)


def tensors_of(model: DALLE) -> list[torch.Tensor]:
    parts = (model.dvae, model.transformer, model.scorer.model)
    return [x for part in parts for x in (*part.parameters(), *part.buffers())]


@pytest.mark.parametrize(
    ("prompts", "settings"),
    [
        (CAPTIONS[:1], {"best_of": 5, "batch_size": 4, "decode_batch_size": 3}),
        (CAPTIONS, {"best_of": 2, "guidance": 2.0, "temperature": 0.7, "top_k": 9, "top_p": 0.9}),
    ],
)
def test_tokens_and_ranks_are_those_of_the_cpu(prompts, settings, on_cpu, there):
    """And the scores, up to rounding."""
    found, expected = (generate(model, prompts, n=2, **settings) for model in (there, on_cpu))
    for one, other in zip(found, expected, strict=True):
        assert one.image_tokens.device.type == "cpu"
        assert (one.candidates, tokens_of(one)) == (other.candidates, tokens_of(other))
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


@pretended_slowly
def test_a_candidate_has_the_same_bits_for_any_best_of(there, prompt):
    shared = {}
    for best_of, decode in ((9, None), (1, None), (5, 1)):
        options = {"batch_size": 4, "decode_batch_size": decode}
        for candidate, row in tokens_of(generate(there, prompt, best_of, **options)).items():
            assert shared.setdefault(candidate, row) == row


@pretended_slowly
def test_a_row_of_an_image_is_kept_and_rows_are_shown(on_cpu, there, prompt):
    own = generate(there, prompt).image_tokens
    again = there.complete(prompt, own, rows=2, n=1, best_of=1, progress=False)
    assert torch.equal(again.image_tokens, own)
    image = generate(there, prompt).images[0]
    completed = [m.complete(prompt, image, rows=2, n=1, best_of=1, progress=False) for m in (there, on_cpu)]
    assert torch.equal(completed[0].image_tokens[:, :8], there.encode(image).cpu()[:, :8])
    assert torch.equal(*(one.image_tokens for one in completed))
    assert len(list(there.stream(prompt))) == 4
    nats = [model.log_likelihood(prompt, own) for model in (there, on_cpu)]
    torch.testing.assert_close(*nats, rtol=1e-4, atol=1e-4)


@pretended_slowly
@pytest.mark.parametrize(("precision", "int8"), [("bf16", False), ("fp16", False), ("fp32", True)])
def test_smaller_matrices(precision, int8, there, prompt):
    rounded = there.to_precision(precision, int8)
    found = generate(rounded, prompt, n=2, best_of=4)
    assert {x.device for x in tensors_of(rounded)} == {there.device}
    assert len(found.images) == 2
    assert 0 <= found.image_tokens.min() <= found.image_tokens.max() < 16


def test_a_model_is_opened_moved_and_saved_there(chain, cuda, prompt, tmp_path):
    opened = DALLE.from_pretrained(chain / "model", "cuda", "auto")
    assert {x.device for x in tensors_of(opened)} == {cuda}
    assert opened.precision == "bf16"
    plain = DALLE.from_pretrained(chain / "model", cuda)
    hashes = plain.hash
    plain.save_pretrained(tmp_path / "model")
    back = DALLE.from_pretrained(tmp_path / "model")
    assert back.hash == hashes
    assert {x.device.type for x in tensors_of(plain.to("cpu"))} == {"cpu"}
    assert generate(plain, prompt).image_tokens.tolist() == generate(back, prompt).image_tokens.tolist()


@only_real
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_changes_no_token_and_its_memory_is_freed(precision, cuda, there, prompt):
    model = there.to_precision(precision)
    generate(model, prompt)  # libraries take memory of their own
    torch.cuda.synchronize()
    before, found = torch.cuda.memory_allocated(cuda), []
    for graph in (None, True, False):
        found.append(generate(model, prompt, n=2, best_of=9, batch_size=4, cuda_graph=graph))
        assert torch.cuda.memory_allocated(cuda) <= before + 2**20
    assert tokens_of(found[0]) == tokens_of(found[1]) == tokens_of(found[2])
    assert isinstance(decode_step_of(model.transformer), CUDAGraphStep)
    assert best_of_n.auto_batch_size(model.transformer, best_of=512) == 512


@only_real
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_samples_while_the_first_is_the_current_one(cuda, on_cpu, prompt):
    expected = tokens_of(generate(on_cpu, prompt, n=2))
    assert tokens_of(generate(on_cpu.to("cuda:1"), prompt, n=2)) == expected
    assert torch.cuda.current_device() == CUDA.index
