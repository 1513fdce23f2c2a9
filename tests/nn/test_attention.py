"""Attention under the model's masks: every backend against a plain softmax (dalle/nn/attention.py)."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from dalle.layout import TokenLayout
from dalle.masks import KINDS, dense_mask
from dalle.nn import ATTENTION_BACKENDS
from dalle.nn.attention import SparseMask, attend, resolve_backend
from dalle.nn.flex_attention import flex_refusal

LAYOUTS = [TokenLayout(2, (1, 3), 5, 5), TokenLayout(5, (4, 4), 5, 5), TokenLayout(7, (3, 8), 5, 5)]
CPU = torch.device("cpu")


def random_inputs(layout, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, layout.seq_len, width, generator=generator)
    return [t.to(dtype).requires_grad_() for t in (q, k, v)], weight


def constant_inputs(layout, **options):
    return [t.detach() for t in random_inputs(layout, **options)[0]]


def values_and_gradients(backend, inputs, pattern, weight):
    out = attend(*inputs, pattern, backend)
    return out, *torch.autograd.grad((out.float() * weight).sum(), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.rows}x{layout.columns}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["sdpa", "window", "auto"])
def test_backends_equal_dense_in_value_and_gradient(backend, kind, layout, dtype, tolerance):
    pattern = SparseMask(kind, layout, kernel=3)
    inputs, weight = random_inputs(layout, dtype=dtype)
    dense, other = (values_and_gradients(name, inputs, pattern, weight) for name in ("dense", backend))
    assert dense[0].dtype == other[0].dtype == dtype
    torch.testing.assert_close(other, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_blocks_score_only_the_text_and_the_near_keys(kind):
    layout = TokenLayout()
    pattern = SparseMask(kind, layout)
    near = {"row": 2 * 32, "column": 32, "conv": 7 * 32}[kind]
    assert pattern.near(CPU).shape == (32, 32, near)
    assert pattern.near(CPU).sum() == dense_mask(kind, layout)[256:, 256:].sum()


# FlexAttention.


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [(LAYOUTS[1], torch.bfloat16, 5e-2), (TokenLayout(100, (9, 7), 5, 5), torch.float32, 1e-5)],
    ids=["4x4-bf16", "9x7-fp32"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_flex_equals_dense_in_value(kind, layout, dtype, tolerance):
    pattern, inputs = SparseMask(kind, layout, kernel=3), constant_inputs(layout, dtype=dtype)
    dense, flex = (attend(*inputs, pattern, backend) for backend in ("dense", "flex"))
    assert flex.dtype == dtype
    torch.testing.assert_close(flex, dense, rtol=tolerance, atol=tolerance)


def test_attention_of_transposed_positions_is_the_transposed_attention():
    """Only flex works in that order; the others come back from it."""
    pattern = SparseMask("column", LAYOUTS[2])
    inputs = constant_inputs(LAYOUTS[2])
    expected = pattern.to_column_major(attend(*inputs, pattern, "dense"))
    exchanged = [pattern.to_column_major(x) for x in inputs]
    for backend in ("dense", "window", "flex"):
        torch.testing.assert_close(attend(*exchanged, pattern, backend, transposed=True), expected)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("row", torch.bfloat16, 5e-2),
        ("column", torch.float16, 1e-2),
        ("conv", torch.float32, 1e-3),
    ],
)
def test_flex_on_cuda_equals_dense_on_the_cpu_in_value_and_gradient(kind, dtype, tolerance):
    """Of a sequence that ends within a block. Each case compiles for seconds."""
    torch._dynamo.reset()
    pattern = SparseMask(kind, TokenLayout(100, (9, 14), 5, 5), kernel=3)
    inputs, weight = random_inputs(pattern.layout, width=16)
    expected = values_and_gradients("dense", inputs, pattern, weight)
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in inputs]
    found = values_and_gradients("flex", inputs, pattern, weight.cuda())
    assert found[0].dtype == dtype
    torch.testing.assert_close([x.cpu().float() for x in found], [*expected], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["dense", "sdpa", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_backends_on_cuda_equal_dense_on_the_cpu_in_value_and_gradient(kind, backend, cuda):
    layout = TokenLayout(13, (3, 8), 5, 5)
    pattern, (inputs, weight) = SparseMask(kind, layout, kernel=3), random_inputs(layout, width=16)
    expected = values_and_gradients("dense", inputs, pattern, weight)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
        inputs = [x.detach().to(cuda, dtype).requires_grad_() for x in inputs]
        found = values_and_gradients(backend, inputs, pattern, weight.to(cuda))
        assert {x.device for x in found} == {cuda}
        found = [x.cpu().float() for x in found]
        torch.testing.assert_close(found, [*expected], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "empty"), [("causal", 45), ("row", 66), ("conv", 60), ("column", 73)])
def test_percentage_of_empty_blocks_at_paper_size(kind, empty):
    """Blocks of 128 x 128 of 1,280 x 1,280 pairs; without the transposition "column" has 45."""
    assert SparseMask(kind, TokenLayout()).blocks(CPU).sparsity() == pytest.approx(empty)


@pytest.mark.parametrize("layout", [TokenLayout(), TokenLayout(100, (9, 25), 5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_every_visible_pair_and_full_ones_nothing_else(kind, layout):
    """The kernel evaluates the predicate in partial blocks and never in full ones."""
    pattern = SparseMask(kind, layout)
    mask = dense_mask(kind, layout).float()
    if kind == "column":
        mask = pattern.to_column_major(pattern.to_column_major(mask).T.contiguous()).T
    side = -layout.seq_len % 128
    padded = torch.nn.functional.pad(mask, (0, side, 0, side))
    pairs = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).sum((1, 3))
    blocks = pattern.blocks(CPU)
    full = BlockMask.from_kv_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices).to_dense()[0, 0] > 0
    assert torch.equal(blocks.to_dense()[0, 0] > 0, pairs > 0)
    assert (pairs[full] == 128 * 128).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.rows}x{layout.columns}")
def test_transposed_positions_go_back_to_raster_order(layout):
    pattern = SparseMask("column", layout)
    x = torch.arange(2 * layout.seq_len * 5.0).view(2, layout.seq_len, 5)
    assert torch.equal(pattern.to_row_major(pattern.to_column_major(x)), x)
    first_column = x[:, layout.text_len :].unflatten(1, layout.grid)[:, :, 0]
    image = pattern.to_column_major(x)[:, layout.text_len :]
    assert torch.equal(image[:, : layout.rows], first_column)


# Choice and refusal.


@pytest.mark.parametrize(
    ("kind", "device", "chosen"),
    [(kind, "cpu", "window") for kind in ("row", "column", "conv")]
    + [(*of, "sdpa") for of in (("causal", "cpu"), ("conv", "mps"), ("row", "cuda"), ("causal", "cuda"))],
)
def test_auto_chooses_by_kind_and_device(kind, device, chosen):
    pattern = SparseMask(kind, LAYOUTS[1], 3)
    assert resolve_backend("auto", pattern, LAYOUTS[1].seq_len, torch.device(device), 64) == chosen


@pytest.mark.parametrize(
    ("device", "triton", "width", "message"),
    [
        ("mps", True, 64, "flex does not run on mps"),
        ("cuda", False, 64, "needs triton"),
        ("cuda", True, 8, "16 wide, got 8"),
    ],
)
def test_a_backend_that_the_device_cannot_run_is_refused(monkeypatch, device, triton, width, message):
    monkeypatch.setattr("dalle.nn.flex_attention._triton", lambda: triton)
    pattern = SparseMask("row", LAYOUTS[1])
    with pytest.raises(ValueError, match=message):
        resolve_backend("flex", pattern, LAYOUTS[1].seq_len, torch.device(device), width)


def test_gradients_of_flex_on_a_cpu_are_refused():
    pattern, (inputs, _) = SparseMask("row", LAYOUTS[1]), random_inputs(LAYOUTS[1])
    with pytest.raises(ValueError, match="flex has no gradients on cpu"):
        attend(*inputs, pattern, "flex")
    with torch.no_grad():
        assert attend(*inputs, pattern, "flex").shape == inputs[0].shape
    assert flex_refusal(CPU, 8) is None


# Details.


@pytest.mark.parametrize("kind", KINDS)
def test_masks_made_in_inference_mode_serve_training_too(kind):
    pattern, (inputs, weight) = SparseMask(kind, LAYOUTS[1], 3), random_inputs(LAYOUTS[1])
    for backend in ("dense", "sdpa", "window"):
        with torch.inference_mode():
            attend(*inputs, pattern, backend)
        values_and_gradients(backend, inputs, pattern, weight)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("kind", ["conv", "causal"])
def test_a_prefix_has_the_attention_of_the_whole(backend, kind):
    layout = LAYOUTS[1]
    pattern = SparseMask(kind, layout, kernel=3)
    q, k, v = constant_inputs(layout)
    whole = attend(q, k, v, pattern, backend)
    for end in range(1, layout.seq_len):
        beginning = attend(q[:, :, :end], k[:, :, :end], v[:, :, :end], pattern, backend)
        torch.testing.assert_close(beginning, whole[:, :, :end])


def test_dense_is_one_softmax_over_all_visible_keys():
    """Paper 2.2: one normalization for text and image keys together."""
    layout = LAYOUTS[0]
    pattern = SparseMask("column", layout)
    q, k, v = constant_inputs(layout, width=4)
    out = attend(q, k, v, pattern, "dense")
    for position in range(layout.seq_len):
        seen = pattern.dense(CPU)[position].nonzero().flatten()
        shares = torch.tensor([math.exp((q[1, 2, position] @ k[1, 2, i]).item() / 2) for i in seen])
        expected = (shares / shares.sum()) @ v[1, 2, seen]
        torch.testing.assert_close(out[1, 2, position], expected)


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = constant_inputs(LAYOUTS[1])
    assert torch.isfinite(attend(100 * q, 100 * k, v, SparseMask("row", LAYOUTS[1]), backend)).all()
