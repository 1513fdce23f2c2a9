"""Things out of shape: what a model draws that miscounts rows, or forgets half way which shape it draws.

A CLIP that has seen whole things only cannot tell them from these (docs/log.md). Each broken image is the given
one, with one thing of it spoilt on the lattice of the shapes set; every spoiling is done downward, in an image
turned by a random quarter first.

    R resolution; rows and columns are cells of the lattice
"""

from collections.abc import Sequence

import numpy as np

from dalle.io.rng import generator
from dalle.shapes.dataset import COLORS, LATTICE, Scene, ShapesDataset, other_shape, render
from dalle.types import CaptionedImages

WAYS = ("drop", "repeat", "shift", "mix")
SHARES = (0.5, 0.25, 0.1, 0.15)  # of the ways
TWO_ROWS = 0.3  # share of drops that take two rows


def corrupted_images(pairs: CaptionedImages, indices: Sequence[int]) -> np.ndarray:
    """The images of the shapes set with these numbers, one thing of each out of shape: float32 (B, 3, R, R).

    Raises:
        ValueError: another set than the shapes, or a resolution that is no multiple of the lattice.
    """
    if not isinstance(pairs, ShapesDataset):
        raise ValueError(
            "only the drawn shapes can be broken; leave --hard-negative-images out for other images"
        )
    scenes, boxes = pairs.drawn(indices)
    whole = render(scenes, boxes, pairs.resolution)
    rngs = [generator("broken", pairs.seed, index) for index in indices]
    return np.stack([break_thing(*of_one) for of_one in zip(whole, scenes, boxes, rngs, strict=True)])


def break_thing(image: np.ndarray, scene: Scene, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy of an image in which one thing is out of shape.

    Args:
        image: float32 (3, R, R) in [0, 1], the scene as rendered; R a multiple of the lattice.
        scene: what it shows.
        boxes: (K, 3) from `draw_layout`.
        rng: says which thing, where and how.
    """
    resolution = image.shape[-1]
    if resolution % LATTICE:
        raise ValueError(
            f"images are broken on a lattice of {LATTICE} cells; {resolution} pixels are no multiple"
        )
    which = int(rng.integers(len(scene.things)))
    turns, way = int(rng.integers(4)), str(rng.choice(WAYS, p=SHARES))
    source = image
    if way == "mix":
        source = render([other_shape(scene, which, rng)], boxes[None], resolution)[0]
    whole, source = (np.rot90(p, turns, axes=(1, 2)).copy() for p in (image, source))
    left, top, extent = _cells(boxes[which], turns)
    cells = whole.reshape(3, LATTICE, resolution // LATTICE, LATTICE, -1)  # a view: color, row, y, column, x
    _spoil(cells, source.reshape(cells.shape), way, left, top, extent, _ground(scene), rng)
    return np.rot90(whole, -turns, axes=(1, 2)).copy()


def _cells(box: np.ndarray, turns: int) -> tuple[int, int, int]:
    """Left, top and extent of a thing in cells, in an image turned `turns` times by np.rot90."""
    extent = round(float(box[2]) * LATTICE)
    left, top = (round(float(centre) * LATTICE - extent / 2) for centre in box[:2])
    for _ in range(turns):
        left, top = top, LATTICE - left - extent
    return left, top, extent


def _ground(scene: Scene) -> np.ndarray:
    return np.array(COLORS[scene.background], np.float32).reshape(3, 1, 1, 1, 1) / 255


def _spoil(cells, source, way, left, top, extent, ground, rng) -> None:
    """Spoils the thing in place. cells and source: (3, rows, y, columns, x)."""
    right, bottom = left + extent, top + extent
    row = top + int(rng.integers(1, extent))  # some row of it, not the first
    thing = cells[:, :, :, left:right]
    if way == "mix":
        cells[:, row:] = source[:, row:]
    elif way == "repeat" and bottom < LATTICE:
        thing[:, row : bottom + 1] = thing[:, row - 1 : bottom].copy()
    elif way == "shift" and right < LATTICE:
        cells[:, row:bottom, :, left + 1 : right + 1] = cells[:, row:bottom, :, left:right].copy()
        cells[:, row:bottom, :, left : left + 1] = ground
    else:  # drop, and what has no room for the others
        rows = min(1 + (rng.random() < TWO_ROWS), bottom - row)
        thing[:, row : bottom - rows] = thing[:, row + rows : bottom].copy()
        thing[:, bottom - rows : bottom] = ground
