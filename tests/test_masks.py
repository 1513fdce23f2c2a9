"""Attention masks (section 2.2, Figure 11; dalle/masks.py)."""

import pytest
import torch

from dalle.layout import TokenLayout
from dalle.masks import KINDS, dense_mask, layer_kinds, visible

TOY = TokenLayout(text_len=6, grid=4, text_vocab=10, image_vocab=10)  # Figure 11: 22 x 22
PAPER = TokenLayout()


def from_strings(lines):
    return torch.tensor([[character == "1" for character in line] for line in lines])


# The image part of Figure 11, a line a query, a character a key; the grid is 4 x 4.
PANELS = """
    row               column            conv
    1000000000000000  1000000000000000  1000000000000000
    1100000000000000  0100000000000000  1100000000000000
    1110000000000000  0010000000000000  0110000000000000
    1111000000000000  0001000000000000  1011000000000000
    1111100000000000  1000100000000000  1101100000000000
    0111110000000000  0100010000000000  1110110000000000
    0011111000000000  0010001000000000  0111011000000000
    0001111100000000  0001000100000000  1011101100000000
    0000111110000000  1000100010000000  0101110110000000
    0000011111000000  0100010001000000  0010111011000000
    0000001111100000  0010001000100000  0001011101100000
    0000000111110000  0001000100010000  0000101110110000
    0000000011111000  1000100010001000  0000010111011000
    0000000001111100  0100010001000100  0000001011101100
    0000000000111110  0010001000100010  0000000101110110
    0000000000011111  0001000100010001  0000000010111011
"""
ROWS = [line.split() for line in PANELS.strip().splitlines()]
FIGURE = {kind: from_strings(panel) for kind, *panel in zip(*ROWS, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_that_of_figure_11(kind):
    """Text is causal and never sees the image; an image token sees all text."""
    mask = dense_mask(kind, TOY, kernel=3)
    causal = torch.ones(22, 22, dtype=torch.bool).tril()
    assert torch.equal(mask[:6], causal[:6])
    assert mask[6:, :6].all()
    assert torch.equal(mask[6:, 6:], FIGURE.get(kind, causal[6:, 6:]))


# Paper size.


@pytest.mark.parametrize(
    ("kind", "pairs"), [("conv", 61_344), ("row", 33_264), ("column", 16_896), ("causal", 524_800)]
)
def test_visible_image_pairs_at_paper_size(kind, pairs):
    """row: 1024 * 33 - (1 + ... + 32); column: 32 * (1 + ... + 32); causal: 1 + ... + 1024."""
    mask = dense_mask(kind, PAPER)[256:, 256:]
    assert mask.sum() == pairs
    assert kind != "conv" or mask.sum(dim=1).max() == 66


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_sees_itself_and_nothing_later(kind):
    mask = dense_mask(kind, PAPER)
    assert mask.shape == (1280, 1280)
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


# Other grids.


@pytest.mark.parametrize("grid", [(2, 5), (5, 3), (1, 4), (4, 1)])
def test_oblong_grids_count_rows_by_their_columns(grid):
    layout = TokenLayout(3, grid, 5, 5)
    rows, columns = grid
    row, column = (dense_mask(kind, layout)[3:, 3:] for kind in ("row", "column"))
    for q in range(rows * columns):
        for k in range(rows * columns):
            assert row[q, k] == (0 <= q - k <= columns)
            assert column[q, k] == (k <= q and q % columns == k % columns)


def test_oblong_convolution():
    """A key is at most one column away, around the edge: the distance is 0, 1, 4, 5, 6 or 9."""
    expected = """
        1000000000
        1100000000
        0110000000
        0011000000
        1001100000
        1100110000
        1110011000
        0111001100
        0011100110
        1001110011
    """
    mask = dense_mask("conv", TokenLayout(2, (2, 5), 5, 5), kernel=3)
    assert torch.equal(mask[2:, 2:], from_strings(expected.split()))
    mask = dense_mask("conv", TOY, kernel=1)  # sees the token itself
    assert torch.equal(mask[6:, 6:], torch.eye(16, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicate_is_the_dense_mask_at_any_positions(kind):
    q, k = torch.tensor([21, 8, 6, 3])[:, None], torch.tensor([0, 5, 6, 7, 20])
    assert torch.equal(visible(kind, TOY, kernel=3)(q, k), dense_mask(kind, TOY, kernel=3)[q, k])


@pytest.mark.parametrize(
    ("kind", "kernel", "message"),
    [
        ("diagonal", 3, "'diagonal'; expected one of row, column"),
        ("conv", 2, "kernel must be odd .* got 2"),
        ("conv", 5, "4 columns, got 5"),
        ("conv", -1, "got -1"),
    ],
)
def test_an_invalid_mask_is_refused(kind, kernel, message):
    with pytest.raises(ValueError, match=message):
        dense_mask(kind, TOY, kernel)


# Which layer has which kind (2.2).


@pytest.mark.parametrize("depth", range(1, 65))
def test_layer_i_is_column_if_i_minus_2_divides_by_4_and_the_last_is_conv(depth):
    *before, last = layer_kinds(depth)
    assert len(before) == depth - 1
    assert last == "conv"
    for i, kind in enumerate(before, start=1):
        assert kind == ("column" if (i - 2) % 4 == 0 else "row")
    with pytest.raises(ValueError, match=r"depth .* got 0"):
        layer_kinds(0)
