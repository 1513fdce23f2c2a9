"""Attention under the masks of the model: every backend against the softmax written out (dalle/nn/attention.py)."""

import math

import pytest
import torch

from dalle.layout import TokenLayout
from dalle.masks import KINDS, dense_mask
from dalle.nn.attention import BACKENDS, Pattern, attend

LAYOUTS = [TokenLayout(2, (1, 3), 5, 5), TokenLayout(5, (4, 4), 5, 5), TokenLayout(7, (3, 8), 5, 5)]


def random_inputs(layout, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, layout.length, width, generator=generator)
    return [t.to(dtype).requires_grad_() for t in (q, k, v)], weight


def values_and_gradients(backend, inputs, pattern, weight):
    out = attend(*inputs, pattern, 0, backend)
    return out, *torch.autograd.grad((out.float() * weight).sum(), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.rows}x{layout.columns}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_backends_equal_dense_in_value_and_gradient(backend, kind, layout, dtype, tolerance):
    pattern = Pattern(kind, layout, kernel=3)
    inputs, weight = random_inputs(layout, dtype=dtype)
    dense, other = (values_and_gradients(name, inputs, pattern, weight) for name in ("dense", backend))
    assert dense[0].dtype == other[0].dtype == dtype
    torch.testing.assert_close(other, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_blocks_score_only_the_text_and_the_near_keys(kind):
    """At the paper's size: 33 of 64, 32 of 32 and 66 of 224 near keys are seen where a query has all of them."""
    layout = TokenLayout()
    pattern = Pattern(kind, layout)
    near = {"row": 2 * 32, "column": 32, "conv": 7 * 32}[kind]
    assert pattern.near.shape == (32, 32, near)
    assert pattern.near.sum() == dense_mask(kind, layout)[256:, 256:].sum()


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.rows}x{layout.columns}")
def test_groups_go_back_to_raster_order(kind, layout):
    pattern = Pattern(kind, layout, kernel=3)
    x = torch.arange(2 * 3 * layout.image_len * 5.0).view(2, 3, layout.image_len, 5)
    assert torch.equal(pattern.ungroup(pattern.group(x)), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_query_over_cached_keys_equals_its_row_of_the_whole(backend):
    layout = LAYOUTS[1]
    pattern = Pattern("conv", layout, kernel=3)
    (q, k, v), _ = random_inputs(layout)
    whole = attend(q, k, v, pattern, 0, backend)
    for slot in range(layout.length):
        end = slot + 1
        one = attend(q[:, :, slot:end], k[:, :, :end], v[:, :, :end], pattern, slot, backend)
        torch.testing.assert_close(one, whole[:, :, slot:end])


def test_dense_is_one_softmax_over_all_visible_keys():
    """Paper 2.2: one normalisation for text and image keys together."""
    layout = LAYOUTS[0]
    pattern = Pattern("column", layout)
    q, k, v = (t.detach() for t in random_inputs(layout, width=4)[0])
    out = attend(q, k, v, pattern, 0, "dense")
    for slot in range(layout.length):
        seen = pattern.mask[slot].nonzero().flatten()
        shares = torch.tensor([math.exp((q[1, 2, slot] @ k[1, 2, i]).item() / 2) for i in seen])
        expected = (shares / shares.sum()) @ v[1, 2, seen]
        torch.testing.assert_close(out[1, 2, slot], expected)


def test_large_scores_do_not_overflow():
    layout = LAYOUTS[1]
    (q, k, v), _ = random_inputs(layout)
    for backend in BACKENDS:
        assert torch.isfinite(attend(100 * q, 100 * k, v, Pattern("row", layout), 0, backend)).all()


def test_an_unknown_backend_is_refused():
    (q, k, v), _ = random_inputs(LAYOUTS[0])
    with pytest.raises(ValueError, match="unknown attention backend 'flash9'; expected one of dense, sdpa"):
        attend(q, k, v, Pattern("row", LAYOUTS[0]), 0, "flash9")
