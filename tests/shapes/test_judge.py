"""The judge and its template matching: true images pass, also soft and coarse ones, and nothing else."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle.shapes import dataset as shapes
from dalle.shapes.judge import attribute_errors, detect, matches_caption

ATTRIBUTES = ("background", "color", "shape", "relation", "place", "size")
LINE = (np.arange(48) + 0.5) / 48
PAIR = "a red circle to the left of a blue square on a yellow background"
ALONE = "a small red circle in the middle on a yellow background"


def samples(split: str, resolution: int, count: int = 200) -> tuple[torch.Tensor, list[str]]:
    """Images and one caption of each, all wordings in turn."""
    dataset = shapes.ShapesDataset(resolution, seed=11, split=split)
    wordings = dataset.captions(range(count))
    return torch.from_numpy(dataset.pixels(range(count))), [w[i % len(w)] for i, w in enumerate(wordings)]


def wrong(texts: list[str]) -> list[str]:
    """Captions that differ in one attribute."""
    rng = np.random.default_rng(0)
    scenes = [shapes.change_one_attribute(shapes.parse_caption(text), rng) for text in texts]
    return [shapes.captions(scene)[0] for scene in scenes]


def paint(background: str, *parts: tuple[str, np.ndarray]) -> np.ndarray:
    """(1, 3, 48, 48), each part a color and the mask (48, 48) that it fills."""
    image = np.tile(np.array(shapes.COLORS[background])[:, None, None] / 255, (1, 48, 48))
    for color, mask in parts:
        image[:, mask] = np.array(shapes.COLORS[color])[:, None] / 255
    return image[None].astype(np.float32)


def outline(shape: str, x: float, y: float, extent: float) -> np.ndarray:
    return shapes.signed_distance(shape, (LINE[None, :] - x) / extent, (LINE[:, None] - y) / extent) < 0


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return ((left < LINE) & (right > LINE))[None, :] & ((top < LINE) & (bottom > LINE))[:, None]


LEFT, RIGHT = outline("circle", 0.26, 0.5, 0.45), outline("square", 0.74, 0.5, 0.45)
MIDDLE = outline("circle", 0.5, 0.5, 0.45)


def soften(pixels: torch.Tensor) -> torch.Tensor:
    pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return (0.85 * pixels + 0.15 * 0.5 + 0.03 * noise).clamp(0, 1)


def coarsen(pixels: torch.Tensor, factor: int, mode: str = "nearest") -> torch.Tensor:
    return F.interpolate(F.avg_pool2d(pixels, factor), scale_factor=factor, mode=mode)


class TestTrueImages:
    @pytest.mark.parametrize(
        ("split", "resolution", "degrade", "least"),
        [
            ("val", 48, torch.clone, 0.99),
            ("new_pairs", 48, torch.clone, 0.99),
            *(("train", resolution, torch.clone, 0.99) for resolution in (32, 50, 64, 96, 256)),
            ("train", 48, soften, 0.97),
            *(("train", 48, partial(coarsen, factor=factor), 0.97) for factor in (2, 3)),
            ("train", 48, partial(coarsen, factor=4, mode="bilinear"), 0.75),  # what 12 x 12 numbers can show
        ],
    )
    def test_true_captions_pass_and_wrong_ones_fail(self, split, resolution, degrade, least):
        pixels, texts = samples(split, resolution)
        assert matches_caption(degrade(pixels), texts).mean() >= least
        assert matches_caption(degrade(pixels), wrong(texts)).mean() <= 0.02

    @pytest.mark.parametrize(("factor", "most"), [(6, 0.45), (8, 0.15)])
    def test_images_without_detail_fail(self, factor, most):
        """A small object is three or four blocks wide; some bars, squares and corners keep their shape."""
        pixels, texts = samples("train", 48, 300)
        coarse = coarsen(pixels, factor)
        assert matches_caption(coarse, texts).mean() <= most
        assert matches_caption(coarse, wrong(texts)).mean() <= 0.02

    def test_each_changed_attribute_is_named(self):
        pixels, texts = samples("val", 48, 600)
        pairs = zip(detect(pixels), map(shapes.parse_caption, wrong(texts)), strict=True)
        named = [attribute_errors(detection, scene) for detection, scene in pairs]
        assert np.mean([len(names) == 1 for names in named]) >= 0.98
        counts = {name: sum(names == [name] for names in named) for name in ATTRIBUTES}
        assert all(count >= 20 for count in counts.values()), counts

    def test_batches_and_types_do_not_matter(self):
        pixels, texts = samples("train", 48, 20)
        names = [[one.shape for found in detect(pixels, n) for one in found.objects] for n in (256, 7)]
        assert names[0] == names[1]
        array = pixels.numpy().copy()
        array.setflags(write=False)
        tensor = pixels.double().requires_grad_()
        assert (matches_caption(array, texts) == matches_caption(tensor, texts)).all()


class TestWrongImages:
    @pytest.mark.parametrize(
        ("text", "parts", "expected"),
        [
            (PAIR, [("red", LEFT), ("blue", RIGHT)], []),
            (ALONE, [("red", MIDDLE)], []),
            (PAIR, [("red", LEFT)], ["count"]),
            (PAIR, [], ["count"]),
            (ALONE, [], ["count"]),
            (ALONE, [("red", LEFT), ("blue", RIGHT)], ["count"]),
            (ALONE, [("red", MIDDLE), ("green", box(0.04, 0.04, 0.21, 0.21))], ["count"]),
            (ALONE, [("red", MIDDLE), ("red", box(0.04, 0.04, 0.21, 0.21))], ["count"]),
            (ALONE, [("red", MIDDLE), ("green", box(0.04, 0.04, 0.125, 0.125))], []),  # a speck
            (ALONE, [("red", MIDDLE), ("green", MIDDLE & box(0, 0, 0.5, 1))], ["count"]),
            (PAIR, [("red", LEFT), ("blue", LEFT & box(0, 0, 1, 0.5))], ["shape", "shape", "relation"]),
            (ALONE, [("green", box(0, 0, 1, 0.5)), ("red", MIDDLE)], ["background", "count"]),
        ],
    )
    def test_missing_extra_and_divided_objects(self, text, parts, expected):
        (detection,) = detect(paint("yellow", *parts))
        assert attribute_errors(detection, shapes.parse_caption(text)) == expected

    def test_unknown_colors(self):
        image, gray = paint("white", ("red", MIDDLE)), np.float32(0.5)
        pixels = [np.where(MIDDLE, gray, image), np.where(MIDDLE, image, gray)]
        gray_object, gray_background = detect(np.concatenate(pixels))
        assert gray_object.objects == ()
        assert gray_object.clutter > 0
        assert gray_background.background is None

    @pytest.mark.parametrize(
        "mask",
        [
            outline("triangle", 0.5, 0.5, 0.5)[::-1],
            outline("circle", 0.5, 0.5, 0.5) & box(0, 0, 0.5, 1),
            box(0.2, 0.45, 0.8, 0.55),
            outline("tee", 0.5, 0.5, 0.5)[::-1],
            outline("arch", 0.5, 0.5, 0.5).T,
            outline("corner", 0.5, 0.5, 0.5)[:, ::-1],
            outline("circle", 0.5, 0.5, 0.6) & ~outline("circle", 0.5, 0.5, 0.35),
        ],
        ids=[
            "triangle upside down",
            "left half",
            "line",
            "tee upside down",
            "arch on its side",
            "corner turned",
            "ring",
        ],
    )
    def test_other_shapes_match_none(self, mask):
        assert all(found.shape is None for found in detect(paint("black", ("cyan", mask)))[0].objects)

    def test_between_a_circle_and_a_square_one_or_neither(self):
        x, y = (LINE[None, :] - 0.5) / 0.5, (LINE[:, None] - 0.5) / 0.5
        circle, square = shapes.signed_distance("circle", x, y), shapes.signed_distance("square", x, y)
        images = [paint("black", ("white", (1 - t) * circle + t * square < 0)) for t in np.linspace(0, 1, 21)]
        names = [found.objects[0].shape for found in detect(np.concatenate(images))]
        assert set(names[:5]) == {"circle"}
        assert set(names[-5:]) == {"square"}
        assert None in names
        assert names == sorted(names, key=["circle", None, "square"].index)

    @pytest.mark.parametrize(
        ("turn", "expected"), [(-40, "left of"), (40, "left of"), (50, "above"), (130, "above")]
    )
    def test_the_greater_distance_is_the_relation(self, turn, expected):
        across, down = 0.27 * np.cos(np.radians(turn)), 0.27 * np.sin(np.radians(turn))
        things = (shapes.Thing("red", "circle"), shapes.Thing("blue", "circle"))
        parts = [
            ("red", outline("circle", 0.5 - across, 0.5 - down, 0.42)),
            ("blue", outline("circle", 0.5 + across, 0.5 + down, 0.42)),
        ]
        (detection,) = detect(paint("white", *parts))
        for relation in shapes.RELATIONS:
            errors = attribute_errors(detection, shapes.Scene("white", things, relation=relation))
            assert errors == ([] if relation == expected else ["relation"])


def test_no_images():
    assert matches_caption(np.zeros((0, 3, 48, 48), np.float32), []).shape == (0,)


@pytest.mark.parametrize(
    ("shape", "value", "texts", "message"),
    [
        ((1, 48, 48, 3), 0.0, [ALONE], r"must be \(B, 3, H, W\)"),
        ((1, 3, 48, 64), 0.0, [ALONE], "pixels of shape"),
        ((1, 3, 24, 24), 0.0, [ALONE], "R at least 32"),
        ((1, 3, 48, 48), 0, [ALONE], "divide uint8 images by 255"),
        ((1, 3, 48, 48), 2.0, [ALONE], r"in \[0, 1\]"),
        ((1, 3, 48, 48), 0.0, [ALONE, ALONE], "1 images with 2 captions"),
        ((1, 3, 48, 48), 0.0, ["a dog"], "not a caption"),
    ],
)
def test_wrong_pixels_and_captions_are_refused(shape, value, texts, message):
    with pytest.raises(ValueError, match=message):
        matches_caption(np.full(shape, value), texts)
