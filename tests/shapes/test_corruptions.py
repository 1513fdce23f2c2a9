"""Corrupted shapes (dalle/shapes/corruptions.py)."""

from types import SimpleNamespace

import numpy as np
import pytest

from dalle.shapes.corruptions import corrupt_object, corrupted_images
from dalle.shapes.dataset import Scene, ShapesDataset, Thing, render
from dalle.shapes.judge import attribute_errors, detect

CELL = 4
SQUARE = Scene("white", (Thing("red", "square"),), place="in the middle", size="small")
BOXES = np.array([[5.5, 5.5, 5], [0, 0, 0]]) / 12  # the five cells from 3 to 7


def corrupted_square(
    turns: int, corruption: str, *integers: int, random: float = 1.0, boxes: np.ndarray = BOXES
) -> np.ndarray:
    """By a generator of given values; `random` decides between one row and two."""
    values = iter([0, turns, *integers])
    rng = SimpleNamespace(
        integers=lambda *bounds: next(values), choice=lambda names, p: corruption, random=lambda: random
    )
    return corrupt_object(render([SQUARE], boxes[None], 48)[0], SQUARE, boxes, rng)


def occupied(image: np.ndarray) -> np.ndarray:
    """Cells of the grid other than the background, bool (12, 12)."""
    return (image[2] < 0.5)[CELL // 2 :: CELL, CELL // 2 :: CELL]


def rectangle(top: int, left: int, bottom: int, right: int) -> np.ndarray:
    cells = np.zeros((12, 12), bool)
    cells[top:bottom, left:right] = True
    return cells


@pytest.mark.parametrize(
    ("turns", "corruption", "random", "expected"),
    [
        (0, "drop", 1, rectangle(3, 3, 7, 8)),
        (0, "drop", 0, rectangle(3, 3, 6, 8)),
        (2, "drop", 1, rectangle(4, 3, 8, 8)),  # downward in an image upside down
        (1, "drop", 1, rectangle(3, 4, 8, 8)),
        (0, "repeat", 1, rectangle(3, 3, 9, 8)),
        (3, "repeat", 1, rectangle(3, 3, 8, 9)),
        (0, "shift", 1, rectangle(3, 3, 5, 8) | rectangle(5, 4, 8, 9)),
    ],
)
def test_corruptions_of_a_square(turns, corruption, random, expected):
    assert (occupied(corrupted_square(turns, corruption, 2, random=random)) == expected).all()


def test_mix_continues_with_another_shape():
    mixed = corrupted_square(0, "mix", 0, 2)  # a circle, from its row 2
    circle = Scene("white", (Thing("red", "circle"),), place="in the middle", size="small")
    square, circle = render([SQUARE, circle], np.stack([BOXES, BOXES]), 48)
    assert (mixed[:, : 5 * CELL] == square[:, : 5 * CELL]).all()
    assert (mixed[:, 5 * CELL :] == circle[:, 5 * CELL :]).all()


@pytest.mark.parametrize(("turns", "corruption"), [(0, "repeat"), (1, "shift")])
def test_without_room_a_row_is_dropped(turns, corruption):
    bottom_left = np.array([[2.5, 9.5, 5], [0, 0, 0]]) / 12
    assert occupied(corrupted_square(turns, corruption, 2, boxes=bottom_left)).sum() == 20


def test_every_image_is_corrupted_and_depends_on_its_index_alone():
    dataset = ShapesDataset(48, seed=3)
    images, corrupted = dataset.pixels(range(64)), corrupted_images(dataset, range(64))
    assert (corrupted.dtype, corrupted.shape) == (images.dtype, images.shape)
    assert (images != corrupted).any(axis=(1, 2, 3)).all()
    assert (corrupted_images(dataset, [7]) == corrupted[7]).all()
    assert (images != corrupted).any(axis=1).mean() < 0.2  # an object covers at most 64 of 144 cells


def test_the_judge_finds_wrong_shapes_in_most_and_wrong_colors_in_none():
    dataset = ShapesDataset(48, seed=4)
    detections = detect(corrupted_images(dataset, range(100)))
    errors = [set(attribute_errors(found, dataset.scene(i))) for i, found in enumerate(detections)]
    assert np.mean([bool(names) for names in errors]) > 0.4
    assert not any(names & {"background", "color"} for names in errors)


def test_other_datasets_and_resolutions_are_refused():
    with pytest.raises(ValueError, match="only the shapes dataset"):
        corrupted_images(object(), [0])
    with pytest.raises(ValueError, match="50 is no multiple of 12"):
        corrupted_images(ShapesDataset(50), [0])
