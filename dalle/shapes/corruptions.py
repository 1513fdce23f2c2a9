"""Corrupted shapes: hard negative images for CLIP.

Generated images often miscount rows of an object, or change its shape half way; a CLIP trained on whole
objects cannot see that (docs/log.md). One object of each image is corrupted on the grid of the dataset.

    R resolution; rows and columns are cells of the grid
"""

from collections.abc import Sequence

import numpy as np

from dalle.sampling import generator
from dalle.shapes.dataset import COLORS, GRID, Scene, ShapesDataset, other_shape, render
from dalle.types import CaptionedImages

CORRUPTIONS = {"drop": 0.5, "repeat": 0.25, "shift": 0.1, "mix": 0.15}  # probabilities
TWO_ROWS = 0.3  # probability that a drop takes two rows


def corrupted_images(dataset: CaptionedImages, indices: Sequence[int]) -> np.ndarray:
    """The images at these indices, one object of each corrupted: float32 (B, 3, R, R)."""
    if not isinstance(dataset, ShapesDataset):
        raise ValueError("only the shapes dataset can be corrupted; leave out --hard-negative-images")
    if dataset.resolution % GRID:
        raise ValueError(f"resolution {dataset.resolution} is no multiple of {GRID}, the cells to corrupt")
    scenes, boxes = dataset.scenes_and_boxes(indices)
    images = render(scenes, boxes, dataset.resolution)
    rngs = [generator("broken", dataset.seed, index) for index in indices]
    return np.stack([corrupt_object(*sample) for sample in zip(images, scenes, boxes, rngs, strict=True)])


def corrupt_object(
    image: np.ndarray, scene: Scene, boxes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A copy of an image (3, R, R) of a scene with one object corrupted, downward after a random rotation.

    R is a multiple of the grid; boxes (K, 3) are from `sample_boxes`.
    """
    while True:
        corrupted = _corrupt(image, scene, boxes, rng)
        if (corrupted != image).any():  # the rest of another shape may be the same
            return corrupted


def _corrupt(image: np.ndarray, scene: Scene, boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    resolution = image.shape[-1]
    which, turns = int(rng.integers(len(scene.things))), int(rng.integers(4))
    corruption = str(rng.choice(list(CORRUPTIONS), p=list(CORRUPTIONS.values())))
    source = image
    if corruption == "mix":
        source = render([other_shape(scene, which, rng)], boxes[None], resolution)[0]
    image, source = (np.rot90(x, turns, axes=(1, 2)).copy() for x in (image, source))
    extent = round(float(boxes[which, 2]) * GRID)
    left, top = (round(float(center) * GRID - extent / 2) for center in boxes[which, :2])
    for _ in range(turns):
        left, top = top, GRID - left - extent
    right = left + extent

    cells = image.reshape(3, GRID, resolution // GRID, GRID, -1)  # a view: color, row, y, column, x
    background = np.array(COLORS[scene.background], np.float32).reshape(3, 1, 1, 1, 1) / 255
    columns = cells[:, :, :, left:right]
    filled = top + np.flatnonzero((columns != background)[:, top : top + extent].any(axis=(0, 2, 3, 4)))
    top, bottom = int(filled[0]), int(filled[-1]) + 1  # a bar fills some rows of its box
    row = top + int(rng.integers(1, bottom - top))  # not the first
    if corruption == "mix":
        cells[:, row:] = source.reshape(cells.shape)[:, row:]
    elif corruption == "repeat" and bottom < GRID:
        columns[:, row : bottom + 1] = columns[:, row - 1 : bottom].copy()
    elif corruption == "shift" and right < GRID:
        cells[:, row:bottom, :, left + 1 : right + 1] = cells[:, row:bottom, :, left:right].copy()
        cells[:, row:bottom, :, left : left + 1] = background
    else:  # drop, also where the others have no room
        count = min(1 + (rng.random() < TWO_ROWS), bottom - row)
        columns[:, row : bottom - count] = columns[:, row + count : bottom].copy()
        columns[:, bottom - count : bottom] = background
    return np.rot90(image, -turns, axes=(1, 2)).copy()
