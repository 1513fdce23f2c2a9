"""Plots of dalle.viz: masks, attention, codebook, curves."""

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from dalle import viz
from dalle.dvae import DVAE, DVAEConfig
from dalle.layout import TokenLayout
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.generate import cast_linear_weights
from dalle.viz.codebook import code_colors
from dalle.viz.masks import FIGURE_11, HIDDEN, IMAGE, QUERY, TEXT

NAMES = {HIDDEN: ".", TEXT: "t", IMAGE: "i", QUERY: "q"}


def letters(image: Image.Image, cell: int = 1) -> list[str]:
    """A letter for the middle of each cell."""
    pixels = np.asarray(image)[cell // 2 :: cell, cell // 2 :: cell]
    return ["".join(NAMES[tuple(map(int, pixel))] for pixel in line) for line in pixels]


class TestMasks:
    @pytest.mark.parametrize(
        ("kind", "line", "expected"),
        [
            ("row", 0, "t" + "." * 21),
            ("row", 5, "tttttt" + "." * 16),
            ("row", 6, "tttttti" + "." * 15),
            ("row", 6 + 15, "tttttt...........iiiii"),
            ("column", 6 + 13, "tttttt.i...i...i...i.."),
            ("conv", 6 + 10, "tttttt...i.iii.ii....."),
        ],
    )
    def test_lines_typed_from_figure_11(self, kind, line, expected):
        assert letters(viz.plot_mask(kind, cell=1))[line] == expected

    def test_transposed_columns_are_blocks(self):
        lines = letters(viz.plot_mask("column", transposed=True, cell=1))
        blocks = np.array([list(line[6:]) for line in lines[6:]])
        assert (blocks == np.where(np.kron(np.eye(4), np.tri(4)) > 0, "i", ".")).all()

    def test_sizes(self):
        cells = viz.plot_mask("row", cell=8)
        assert (cells.size, cells.getpixel((8, 3))) == ((22 * 8, 22 * 8), (255, 255, 255))
        assert letters(cells, 8) == letters(viz.plot_mask("row", cell=1))
        assert viz.plot_mask("causal").width >= 352
        paper = viz.plot_mask("conv", TokenLayout(), 11, cell=1)
        assert (np.asarray(paper)[256:, 256:] == IMAGE).all(-1).sum() == 61_344  # as tests/test_masks.py
        assert viz.plot_figure_11(TokenLayout(8, 12, 1, 1), 11, cell=2).width == 2 * (152 * 2 + 10) + 10

    def test_receptive_fields(self):
        row = letters(viz.plot_receptive_field("row", FIGURE_11, 1, 2, cell=1))
        column = letters(viz.plot_receptive_field("column", FIGURE_11, 2, 1, cell=1))
        assert row == ["..ii", "iiq.", "....", "...."]
        assert column == [".i..", ".i..", ".q..", "...."]


@pytest.fixture
def lively() -> Transformer:
    """Every kind of layer, with weights large enough that attention is far from even."""
    torch.manual_seed(3)
    sizes = {"depth": 4, "heads": 3, "head_dim": 8, "conv_kernel": 3, "full_attention_every": 3}
    tokens = {"text_len": 5, "grid": (4, 4), "text_vocab": 11, "image_vocab": 7}
    config = TransformerConfig(**sizes, **tokens, init_scale=3.0, attention_backend="sdpa")
    return Transformer(config).eval()


class TestAttention:
    def ids(self, model: Transformer) -> torch.Tensor:
        rng = torch.Generator().manual_seed(5)
        text = model.layout.pad_text([[1, 2], [3, 4, 5]])
        return model.layout.pack(text, torch.randint(7, (2, 16), generator=rng))

    def test_the_weights_make_what_the_layer_gives(self, lively):
        ids, seen = self.ids(lively), []
        for layer in lively.layers:
            layer.attention.f.register_forward_hook(lambda *call: seen.append(call))
        with torch.no_grad():
            lively(ids)
        layers = list(viz.attention_weights(lively, ids))
        kinds = ["row", "column", "causal", "conv"]
        assert [(one.layer, one.kind) for one in layers] == list(enumerate(kinds))
        for (module, (x, *_), made), one in zip(seen[:4], layers, strict=True):
            v = rearrange(module.qkv(x), "b n (three h d) -> three b h n d", three=3, h=module.heads)[2]
            mixed = rearrange(one.weights @ v, "b h n d -> b n (h d)")
            torch.testing.assert_close(module.out(mixed), made, atol=1e-5, rtol=1e-4)
            assert one.weights.amax() > 0.5  # even weights would hide a wrong order

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lines_add_up_to_one_over_what_is_visible(self, lively, dtype):
        model = cast_linear_weights(lively, dtype)
        for one in viz.attention_weights(model, self.ids(lively)):
            sees = model.patterns[one.kind].dense(torch.device("cpu"))
            torch.testing.assert_close(one.weights.sum(-1), torch.ones(2, 3, 21))
            assert (one.weights[:, :, ~sees] == 0).all()

    def test_a_key_lies_where_the_token_is_that_its_slot_read(self):
        layout = TokenLayout(5, (2, 3), 4, 4)
        found = viz.attention_shares(torch.arange(11.0), layout, words=2)
        assert (found.text.tolist(), found.pads, found.start) == ([0, 1, 2], 3 + 4, 5)  # start, two words
        assert found.image.tolist() == [[6, 7, 8], [9, 10, 0]]

    def test_the_image_has_a_line_for_each_kind(self, dalle, prompt):
        positions = [(1, 1), (3, 2)]
        image = viz.plot_attention(dalle, prompt, torch.arange(16), positions)
        one = viz.plot_attention(dalle, prompt, Image.new("RGB", (40, 40), "red"), positions, layers=[0])
        assert image.height == pytest.approx(2 * one.height, abs=2)  # row and conv
        assert image.width == one.width

    def test_the_matrix_is_brightest_at_the_largest_weight(self):
        image = np.asarray(viz.attention_heatmap(torch.tensor([[1.0, 0.0], [0.2, 0.8]]))).sum(-1, dtype=int)
        assert (image[0, 0], image[0, 1]) == (image.max(), image.min())


@pytest.fixture(scope="module")
def dvae() -> DVAE:
    torch.manual_seed(0)
    return DVAE(DVAEConfig((8, 8, 8), 1, 4, vocab_size=12, codebook_dim=8)).eval()


class TestCodes:
    def test_a_code_alone_is_the_middle_of_a_field_of_it(self, dvae):
        found = viz.decode_codebook(dvae, [7, 2], around=3, batch=1)
        field = dvae.decode(torch.full((1, 49), 7))
        assert found.shape == (2, 3, 4, 4)
        torch.testing.assert_close(found[0], field[0, :, 12:16, 12:16])
        assert not torch.equal(found[0], found[1])
        near, far = (viz.decode_codebook(dvae, [3], around=around) for around in (6, 12))
        torch.testing.assert_close(near, far, atol=1e-5, rtol=0)  # the edge does not show

    def test_the_sheet_has_all_codes_in_order(self, dvae):
        sheet = viz.plot_codebook(dvae, columns=5, scale=2)
        assert sheet.size == (5 * 10 + 2, 3 * 10 + 2)
        tile = np.asarray(sheet)[2 + 10 : 2 + 18 : 2, 2 + 20 : 2 + 28 : 2]  # second row, third column: code 7
        expected = (viz.decode_codebook(dvae, [7])[0].movedim(0, -1) * 255).round().byte().numpy()
        assert (tile == expected).all()

    def test_the_map_gives_each_code_its_color(self):
        image = viz.token_map(torch.tensor([3, 0, 3, 5, 1, 2]), 8, (2, 3), cell=4)
        assert image.size == (12, 8)
        assert (np.asarray(image)[1, 1::4] == code_colors(8)[[3, 0, 3]]).all()
        assert len({tuple(color) for color in code_colors(256).tolist()}) == 256

    def test_counting(self, dvae):
        pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        times = viz.count_codes(dvae, pixels.split(2))
        assert times.tolist() == torch.bincount(dvae.encode(pixels).flatten(), minlength=12).tolist()
        assert viz.plot_code_usage(times).width > 300
        assert viz.plot_code_usage(torch.tensor([0, 9])).width > 300  # one code alone

    def test_reconstructions_side_by_side(self, dvae):
        pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        state = torch.get_rng_state()
        image = viz.plot_reconstructions(dvae, pixels, tau=0.5)
        assert torch.equal(torch.get_rng_state(), state)
        side, cell = 64 * 2, 64 * 2 + 2 * 4
        assert image.width == 4 * (cell + 10) + 10
        shown = np.asarray(image).astype(float) / 255
        hard = dvae.decode(dvae.encode(pixels))[1].movedim(0, -1).numpy()
        left, top = 10 + 2 * (cell + 10) + 4, 10 + 4 + side + 4
        np.testing.assert_allclose(shown[top : top + side : 2, left : left + side : 2], hard, atol=1 / 255)
        assert np.array_equal(shown, np.asarray(viz.plot_reconstructions(dvae, pixels, tau=0.5)) / 255)


def attend(dalle, *shape: int, **options) -> Image.Image:
    return viz.plot_attention(dalle, "a red cross", torch.zeros(shape, dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda dalle: viz.plot_receptive_field("row", FIGURE_11, 4, 0), "grid of 4 x 4"),
        (lambda dalle: viz.plot_mask("rows"), "unknown attention kind"),
        (lambda dalle: viz.plot_mask("row", cell=0), "cell must be"),
        (lambda dalle: attend(dalle, 1, 16, positions=[(0, 4)]), "grid of 4 x 4"),
        (lambda dalle: attend(dalle, 1, 16, layers=[2]), "layers must be from 0 to 1"),
        (lambda dalle: attend(dalle, 2, 16), "at most 16"),
        (lambda dalle: attend(dalle, 1, 9), "9 tokens do not fill a grid"),
        (lambda dalle: next(viz.attention_weights(dalle.dvae, torch.zeros(1, 16))), "Transformer, got DVAE"),
        (lambda dalle: viz.attention_heatmap(torch.zeros(3, 2, 2)), "take a head"),
        (lambda dalle: viz.plot_reconstructions(dalle.transformer, torch.zeros(1, 3, 8, 8)), "a DVAE, got"),
        (lambda dalle: viz.decode_codebook(dalle.dvae, [16]), r"codes must be in \[0, 16\), got 16"),
        (lambda dalle: viz.decode_codebook(dalle.dvae, []), "one code or more"),
        (lambda dalle: viz.token_map(torch.tensor([8]), 8), "must be in"),
    ],
)
def test_what_cannot_be_shown_is_refused(dalle, plot, message):
    with pytest.raises(ValueError, match=message):
        plot(dalle)
