"""The judge of the shapes set: passes true images, also soft and stepped ones, and nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle.shapes import judge as shapes_judge
from dalle.shapes import template_match as shapes_fit
from dalle.shapes.dataset import (
    COLORS,
    RELATIONS,
    SHAPES,
    Scene,
    ShapesDataset,
    Thing,
    captions,
    change_one_attribute,
    parse_caption,
    render,
    signed_distance,
)
from dalle.shapes.judge import accuracy, disagreements, matches_caption, read_image, read_images

ATTRIBUTES = ("background", "color", "shape", "relation", "place", "size")
LINE = (np.arange(48) + 0.5) / 48


def drawn(split: str, resolution: int, count: int = 300) -> tuple[torch.Tensor, list[str]]:
    """Images, and one wording of each, in turn."""
    pairs = ShapesDataset(resolution, seed=11, split=split)
    wordings = pairs.captions(range(count))
    return torch.from_numpy(pairs.pixels(range(count))), [w[i % len(w)] for i, w in enumerate(wordings)]


def changed(texts: list[str], seed: int = 0) -> list[str]:
    """Captions that are wrong in one attribute."""
    rng = np.random.default_rng(seed)
    return [captions(change_one_attribute(parse_caption(text), rng))[0] for text in texts]


def painted(ground: str, *parts: tuple[str, np.ndarray]) -> np.ndarray:
    """(3, 48, 48), each part a color and the mask (48, 48) that it fills."""
    image = np.tile(np.array(COLORS[ground])[:, None, None] / 255, (1, 48, 48))
    for color, mask in parts:
        image[:, mask] = np.array(COLORS[color])[:, None] / 255
    return image.astype(np.float32)


def outline(shape: str, x: float, y: float, extent: float) -> np.ndarray:
    return signed_distance(shape, (LINE[None, :] - x) / extent, (LINE[:, None] - y) / extent) < 0


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return ((left < LINE) & (right > LINE))[None, :] & ((top < LINE) & (bottom > LINE))[:, None]


def blurred(pixels: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)


def noisy(pixels: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (pixels + 0.03 * noise).clamp(0, 1)


def greyed(pixels: torch.Tensor) -> torch.Tensor:
    return 0.85 * pixels + 0.15 * 0.5


def stepped(pixels: torch.Tensor, step: int) -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(pixels, step), scale_factor=step)


def patched(pixels: torch.Tensor) -> torch.Tensor:
    """Averages of patches with straight lines between them: what an image of 12 x 12 numbers can show."""
    return F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")


class TestDrawings:
    @pytest.mark.parametrize("split", ["train", "held_out", "new_pairs"])
    @pytest.mark.parametrize("resolution", [48, 64, 96])
    def test_true_pairs_pass_and_mismatched_pairs_fail(self, split, resolution):
        pixels, texts = drawn(split, resolution)
        assert accuracy(pixels, texts) >= 0.99
        assert accuracy(pixels, changed(texts)) <= 0.02

    @pytest.mark.parametrize("resolution", [32, 50, 256])
    def test_other_resolutions(self, resolution):
        pixels, texts = drawn("train", resolution, 100)
        assert accuracy(pixels, texts) >= 0.98
        assert accuracy(pixels, changed(texts)) <= 0.02

    def test_each_kind_of_change_is_found_and_named(self):
        pixels, texts = drawn("held_out", 48, 600)
        readings = read_images(pixels)
        named = [disagreements(r, parse_caption(t)) for r, t in zip(readings, changed(texts), strict=True)]
        assert np.mean([len(names) == 1 for names in named]) >= 0.98
        found = {name: sum(names == [name] for names in named) for name in ATTRIBUTES}
        assert all(count >= 20 for count in found.values()), found

    def test_reading_gives_places_and_sizes(self):
        scene = Scene("cyan", (Thing("red", "triangle"), Thing("black", "square")), relation="left of")
        boxes = np.array([[[0.26, 0.4, 0.45], [0.74, 0.6, 0.43]]])
        reading = read_image(render([scene], boxes, 48)[0])
        assert reading.ground == "cyan"
        assert reading.litter == 0
        assert {(thing.color, thing.shape) for thing in reading.things} == {
            ("red", "triangle"),
            ("black", "square"),
        }
        for thing in reading.things:
            x, y, extent = boxes[0, int(thing.color == "black")]
            assert thing.centre == pytest.approx((x, y), abs=0.01)
            assert thing.extent == pytest.approx(extent, abs=0.03)

    def test_a_image_is_read_alone(self):
        pixels, _ = drawn("train", 48, 20)
        for one, many in zip(map(read_image, pixels), read_images(pixels, chunk=7), strict=True):
            assert one.ground == many.ground
            assert [(t.color, t.shape) for t in one.things] == [(t.color, t.shape) for t in many.things]

    def test_numpy_and_torch_give_the_same(self):
        pixels, texts = drawn("train", 48, 20)
        frozen = pixels.numpy().copy()
        frozen.setflags(write=False)
        np.testing.assert_array_equal(
            matches_caption(frozen, texts), matches_caption(pixels.double().requires_grad_(), texts)
        )


class TestSoftImages:
    @pytest.mark.parametrize(
        "spoil",
        [
            blurred,
            noisy,
            greyed,
            lambda p: noisy(greyed(blurred(p))),
            lambda p: stepped(p, 2),
            lambda p: stepped(p, 3),
        ],
        ids=["blurred", "noisy", "greyed", "all three", "steps of 2", "steps of 3"],
    )
    def test_slightly_spoilt_images_pass(self, spoil):
        pixels, texts = drawn("train", 48)
        assert accuracy(spoil(pixels), texts) >= 0.97
        assert accuracy(spoil(pixels), changed(texts)) <= 0.02

    def test_soft_patches_mostly_pass(self):
        pixels, texts = drawn("train", 48)
        assert accuracy(patched(pixels), texts) >= 0.93
        assert accuracy(patched(pixels), changed(texts)) <= 0.02

    @pytest.mark.parametrize(("step", "most"), [(6, 0.35), (8, 0.25)])
    def test_images_without_detail_fail_on_shape(self, step, most):
        """A small thing is three or four blocks wide. Crosses, and squares whose sides fall on blocks, keep their
        shape in blocks, so only scenes without them are asked."""
        pixels, texts = drawn("train", 48)
        asked = [i for i, text in enumerate(texts) if not {"cross", "square"} & set(text.split())]
        assert len(asked) > 50
        assert accuracy(stepped(pixels, step)[asked], [texts[i] for i in asked]) <= most
        assert accuracy(stepped(pixels, step), changed(texts)) <= 0.02

    def test_a_shape_in_blocks_is_not_taken_for_another(self):
        pixels, texts = drawn("train", 48)
        for reading, text in zip(read_images(stepped(pixels, 4)), texts, strict=True):
            said = {thing.color: thing.shape for thing in parse_caption(text).things}
            assert all(thing.shape in (None, said.get(thing.color)) for thing in reading.things)


class TestWrongImages:
    PAIR = "a red circle to the left of a blue square on a yellow background"
    CIRCLE, SQUARE = outline("circle", 0.26, 0.5, 0.45), outline("square", 0.74, 0.5, 0.45)
    ALONE = "a small red circle in the middle on a yellow background"
    MIDDLE = outline("circle", 0.5, 0.5, 0.45)

    def names(self, text: str, ground: str, *parts: tuple[str, np.ndarray]) -> list[str]:
        return disagreements(read_image(painted(ground, *parts)), parse_caption(text))

    def test_the_painted_images_are_right_otherwise(self):
        assert self.names(self.PAIR, "yellow", ("red", self.CIRCLE), ("blue", self.SQUARE)) == []
        assert self.names(self.ALONE, "yellow", ("red", self.MIDDLE)) == []

    def test_missing_thing(self):
        assert self.names(self.PAIR, "yellow", ("red", self.CIRCLE)) == ["count"]

    def test_blank_image(self):
        for text in (self.PAIR, self.ALONE):
            assert self.names(text, "yellow") == ["count"]

    def test_extra_thing(self):
        assert self.names(self.ALONE, "yellow", ("red", self.CIRCLE), ("blue", self.SQUARE)) == ["count"]

    @pytest.mark.parametrize("color", ["green", "red", "white"])
    def test_extra_blob(self, color):
        blob = box(0.04, 0.04, 0.21, 0.21)
        assert self.names(self.ALONE, "yellow", ("red", self.MIDDLE), (color, blob)) == ["count"]

    def test_speck_is_ignored(self):
        speck = box(0.04, 0.04, 0.125, 0.125)
        assert self.names(self.ALONE, "yellow", ("red", self.MIDDLE), ("green", speck)) == []

    def test_thing_of_two_colors(self):
        half = self.MIDDLE & box(0, 0, 0.5, 1)
        assert self.names(self.ALONE, "yellow", ("red", self.MIDDLE), ("green", half)) == ["count"]
        half = self.CIRCLE & box(0, 0, 1, 0.5)
        assert self.names(self.PAIR, "yellow", ("red", self.CIRCLE), ("blue", half)) != []

    def test_ground_of_two_colors(self):
        parts = ("green", box(0, 0, 1, 0.5)), ("red", self.MIDDLE)
        assert "count" in self.names(self.ALONE, "yellow", *parts)

    def test_color_of_no_name(self):
        image = painted("white", ("red", self.MIDDLE))
        grey = np.where(self.MIDDLE, np.float32(0.5), image)
        assert read_image(grey).things == ()
        assert read_image(grey).litter > 0
        grey = np.where(self.MIDDLE, image, np.float32(0.5))
        assert read_image(grey).ground is None

    @pytest.mark.parametrize(
        "mask",
        [
            outline("triangle", 0.5, 0.5, 0.5)[::-1],
            outline("circle", 0.5, 0.5, 0.5) & box(0, 0, 0.5, 1),
            box(0.2, 0.4, 0.8, 0.6),
            np.abs(LINE - 0.5)[:, None] + np.abs(LINE - 0.5) < 0.25,
            outline("square", 0.5, 0.5, 0.5) & ~box(0.45, 0, 1, 0.5),
            outline("circle", 0.5, 0.5, 0.6) & ~outline("circle", 0.5, 0.5, 0.35),
        ],
        ids=["triangle upside down", "half circle", "bar", "diamond", "corner", "ring"],
    )
    def test_other_shapes_are_none_of_ours(self, mask):
        assert all(thing.shape is None for thing in read_image(painted("black", ("cyan", mask))).things)

    def test_between_a_circle_and_a_square_one_or_neither(self):
        x, y = (LINE[None, :] - 0.5) / 0.5, (LINE[:, None] - 0.5) / 0.5
        circle, square = signed_distance("circle", x, y), signed_distance("square", x, y)
        shapes = [
            read_image(painted("black", ("white", (1 - t) * circle + t * square < 0))).things[0].shape
            for t in np.linspace(0, 1, 21)
        ]
        assert shapes[:5] == ["circle"] * 5
        assert shapes[-5:] == ["square"] * 5
        assert None in shapes
        assert shapes == sorted(shapes, key=["circle", None, "square"].index)

    @pytest.mark.parametrize(
        ("turn", "holds"), [(-40, "left of"), (40, "left of"), (50, "above"), (130, "above")]
    )
    def test_the_greater_distance_makes_the_relation(self, turn, holds):
        across, down = 0.27 * np.cos(np.radians(turn)), 0.27 * np.sin(np.radians(turn))
        things = (Thing("red", "circle"), Thing("blue", "circle"))
        parts = [
            ("red", outline("circle", 0.5 - across, 0.5 - down, 0.42)),
            ("blue", outline("circle", 0.5 + across, 0.5 + down, 0.42)),
        ]
        reading = read_image(painted("white", *parts))
        for relation in RELATIONS:
            wrong = disagreements(reading, Scene("white", things, relation=relation))
            assert wrong == ([] if relation == holds else ["relation"])


class TestDoors:
    def test_empty(self):
        assert matches_caption(np.zeros((0, 3, 48, 48), np.float32), []).shape == (0,)
        with pytest.raises(ValueError, match="no images to judge"):
            accuracy(np.zeros((0, 3, 48, 48), np.float32), [])

    @pytest.mark.parametrize(
        ("pixels", "message"),
        [
            (np.zeros((3, 48, 48), np.float32), "pixels of shape"),
            (np.zeros((1, 48, 48, 3), np.float32), "pixels of shape"),
            (np.zeros((1, 3, 48, 64), np.float32), "pixels of shape"),
            (np.zeros((1, 3, 24, 24), np.float32), "R at least 32"),
            (np.zeros((1, 3, 48, 48), np.uint8), "divide by 255"),
            (np.full((1, 3, 48, 48), 2.0, np.float32), "pixels from 2 to 2"),
            (np.full((1, 3, 48, 48), -0.1, np.float32), "pixels from -0.1"),
            (np.full((1, 3, 48, 48), np.nan, np.float32), "pixels from nan"),
        ],
    )
    def test_pixels(self, pixels, message):
        with pytest.raises(ValueError, match=message):
            matches_caption(pixels, [TestWrongImages.ALONE])

    def test_captions(self):
        with pytest.raises(ValueError, match="1 images with 2 captions"):
            matches_caption(np.zeros((1, 3, 48, 48), np.float32), [TestWrongImages.ALONE] * 2)
        with pytest.raises(ValueError, match="not a caption of the shapes set"):
            matches_caption(np.zeros((1, 3, 48, 48), np.float32), ["a dog"])


class TestParts:
    @pytest.mark.parametrize("radius", [1, 2, 7])
    def test_highest_is_a_max_pool(self, radius):
        x = torch.rand(3, 48, 48)
        pooled = F.max_pool2d(x[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
        torch.testing.assert_close(shapes_judge._highest(x, radius), pooled, rtol=0, atol=0)

    def test_regions_are_those_of_a_plain_flood(self):
        mask = torch.rand(4, 48, 48, generator=torch.Generator().manual_seed(0)) < 0.35
        for plane, regions in zip(mask.numpy(), shapes_judge._regions(mask).numpy(), strict=True):
            left, count = {tuple(p) for p in np.argwhere(plane)}, 0
            while left:
                stack, count = [left.pop()], count + 1
                names = set()
                while stack:
                    row, column = stack.pop()
                    names.add(regions[row, column])
                    near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                    left -= near
                    stack += near
                assert len(names) == 1
                assert names != {0}
            assert len(np.unique(regions[plane])) == count
            assert not regions[~plane].any()

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("extent", [0.42, 0.67])
    def test_fit_finds_the_pose(self, shape, extent):
        cover = torch.from_numpy(outline(shape, 0.43, 0.56, extent)).float()[None]
        (fit,) = shapes_fit.fit_shapes(cover)
        assert fit.shape == shape
        assert fit.centre == pytest.approx((0.43, 0.56), abs=0.01)
        assert fit.extent == pytest.approx(extent, rel=0.05)
        assert fit.overlap > 0.93
