"""Things out of shape, for CLIP to tell from whole ones (dalle/shapes/corruptions.py)."""

import numpy as np
import pytest

from dalle.shapes.corruptions import SHARES, WAYS, break_thing, corrupted_images
from dalle.shapes.dataset import Scene, ShapesDataset, Thing, render
from dalle.shapes.judge import disagreements, read_image

CELL = 4
SQUARE = Scene("white", (Thing("red", "square"),), place="in the middle", size="small")
BOXES = np.array([[5.5, 5.5, 5], [0, 0, 0]]) / 12  # cells 3 to 7 in both directions


class Scripted:
    """A generator whose draws are given: which thing, the turns, the way, the row, one row or two."""

    def __init__(self, turns: int, way: str, row: int, two: float = 1.0):
        self.integers_, self.way, self.two = iter([0, turns, row]), way, two

    def integers(self, *bounds) -> int:
        return next(self.integers_)

    def choice(self, names, p):
        assert sum(p) == pytest.approx(1)
        return self.way

    def random(self) -> float:
        return self.two


def occupied(image: np.ndarray) -> np.ndarray:
    """Cells of the lattice that are not the ground, bool (12, 12)."""
    return (image[2] < 0.5)[CELL // 2 :: CELL, CELL // 2 :: CELL]


def broken_square(*script) -> np.ndarray:
    image = render([SQUARE], BOXES[None], 48)[0]
    return occupied(break_thing(image, SQUARE, BOXES, Scripted(*script)))


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    cells = np.zeros((12, 12), bool)
    cells[top:bottom, left:right] = True
    return cells


def test_whole_the_square_is_five_by_five():
    assert (occupied(render([SQUARE], BOXES[None], 48)[0]) == rectangle(3, 3, 8, 8)).all()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ((0, "drop", 2), rectangle(3, 3, 7, 8)),
        ((0, "drop", 2, 0.0), rectangle(3, 3, 6, 8)),
        ((2, "drop", 2), rectangle(4, 3, 8, 8)),  # downward in an image upside down
        ((1, "drop", 2), rectangle(3, 4, 8, 8)),
        ((0, "repeat", 2), rectangle(3, 3, 9, 8)),
        ((3, "repeat", 2), rectangle(3, 3, 8, 9)),
        ((0, "shift", 2), rectangle(3, 3, 5, 8) | rectangle(5, 4, 8, 9)),
    ],
)
def test_each_way_on_a_square(script, expected):
    assert (broken_square(*script) == expected).all()


def test_mixing_draws_the_rest_of_another_shape():
    image = render([SQUARE], BOXES[None], 48)[0]
    script = Scripted(0, "mix", 2)
    script.integers_ = iter(
        [0, 0, 0, 2]
    )  # the thing, no turn, the first other shape (circle), from row 2 of it on
    broken = break_thing(image, SQUARE, BOXES, script)
    circle = render(
        [Scene("white", (Thing("red", "circle"),), place="in the middle", size="small")], BOXES[None], 48
    )
    assert (broken[:, : 5 * CELL] == image[:, : 5 * CELL]).all()
    assert (broken[:, 5 * CELL :] == circle[0][:, 5 * CELL :]).all()


def test_what_has_no_room_is_dropped_instead():
    boxes = np.array([[2.5, 9.5, 5], [0, 0, 0]]) / 12  # at the bottom left
    image = render([SQUARE], boxes[None], 48)[0]
    for turns, way in ((0, "repeat"), (1, "shift")):
        assert occupied(break_thing(image, SQUARE, boxes, Scripted(turns, way, 2))).sum() == 20


def test_only_images_change_and_each_is_its_own():
    pairs = ShapesDataset(48, seed=3)
    whole, broken = pairs.pixels(range(64)), corrupted_images(pairs, range(64))
    assert broken.dtype == whole.dtype
    assert broken.shape == whole.shape
    assert ((whole != broken).any(axis=(1, 2, 3))).all()
    assert (pairs.pixels(range(64)) == whole).all()
    assert (corrupted_images(pairs, [7]) == broken[7]).all()
    assert (whole != broken).any(axis=1).mean() < 0.2  # a thing covers at most 64 of 144 cells


def test_the_judge_finds_shapes_wrong_in_most_and_colors_in_none():
    pairs = ShapesDataset(48, seed=4)
    scenes, _ = pairs.drawn(range(100))
    found = [
        disagreements(read_image(p), s)
        for p, s in zip(corrupted_images(pairs, range(100)), scenes, strict=True)
    ]
    assert np.mean([bool(wrong) for wrong in found]) > 0.4
    assert not any(set(wrong) & {"background", "color"} for wrong in found)


def test_the_shares_are_a_distribution():
    assert len(SHARES) == len(WAYS)
    assert sum(SHARES) == pytest.approx(1)


def test_other_sets_and_resolutions_are_refused():
    with pytest.raises(ValueError, match="only the drawn shapes can be broken"):
        corrupted_images(object(), [0])
    with pytest.raises(ValueError, match="lattice of 12 cells; 50 pixels are no multiple"):
        corrupted_images(ShapesDataset(50), [0])
