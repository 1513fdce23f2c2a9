"""Random crops of the paper (Listings 1 and 2) and the resize by area: dalle/data/transforms.py."""

import math

import numpy as np
import pytest
from PIL import Image

from dalle.data.transforms import Crop, apply_crop, dvae_crop, transform, transformer_crop


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Scripted:
    """A generator with given values; it records the bounds, the upper one excluded."""

    def __init__(self, *values):
        self.values, self.bounds = list(values), []

    def integers(self, low, high=None, size=None):
        bounds = (0, low) if high is None else (low, high)
        self.bounds += [bounds] * (size or 1)
        values = [self.random() for _ in range(size or 1)]
        return np.array(values) if size else values[0]

    def random(self):
        return self.values.pop(0)


@pytest.mark.parametrize(
    ("crop_of", "size", "values", "crop", "bounds"),
    [
        (  # a square of 300, resized to 288 .. 300 (12/8 R is larger), flipped below 0.5
            dvae_crop,
            (400, 300),
            (100, 0, 290, 5, 34, 0.49),
            Crop(100, 0, 300, 290, 5, 34, flip=True),
            [(0, 101), (0, 1), (288, 301), (0, 35), (0, 35)],
        ),
        (
            dvae_crop,
            (1000, 1200),
            (0, 200, 384, 128, 0, 0.5),
            Crop(0, 200, 1000, 384, 128, 0, flip=False),
            [(0, 1), (0, 201), (288, 385), (0, 129), (0, 129)],
        ),
        (  # smaller than 9/8 R
            dvae_crop,
            (260, 260),
            (0, 0, 260, 1, 2, 0.9),
            Crop(0, 0, 260, 260, 1, 2, flip=False),
            [(0, 1), (0, 1), (260, 261), (0, 5), (0, 5)],
        ),
        (  # slack 160, so left is 3/8 to 5/8 of it, 5/8 excluded; resized to 256 .. 288
            transformer_crop,
            (640, 480),
            (60, 0, 288, 32, 7),
            Crop(60, 0, 480, 288, 32, 7),
            [(60, 100), (0, 1), (256, 289), (0, 33), (0, 33)],
        ),
        (  # slack 1: 3 * 1 // 8 = 5 * 1 // 8 = 0; the image ends at 270
            transformer_crop,
            (270, 271),
            (0, 0, 270, 14, 14),
            Crop(0, 0, 270, 270, 14, 14),
            [(0, 1), (0, 1), (256, 271), (0, 15), (0, 15)],
        ),
    ],
)
def test_the_listings(crop_of, size, values, crop, bounds):
    rng = Scripted(*values)
    assert crop_of(*size, 256, rng) == crop
    assert rng.bounds == bounds


@pytest.mark.parametrize("crop_of", [dvae_crop, transformer_crop])
def test_crops_of_any_size_lie_inside_and_never_enlarge(crop_of):
    rng = np.random.default_rng(0)
    for _ in range(2000):
        resolution = int(rng.integers(1, 65))
        width, height = (int(side) for side in rng.integers(resolution, 4 * resolution + 1, size=2))
        crop = crop_of(width, height, resolution, rng)
        assert crop.side == min(width, height)
        assert 0 <= crop.left <= width - crop.side
        assert 0 <= crop.top <= height - crop.side
        assert resolution <= crop.resized <= crop.side
        assert 0 <= crop.inner_left <= crop.resized - resolution
        assert 0 <= crop.inner_top <= crop.resized - resolution
    with pytest.raises(ValueError, match="300 x 255 is smaller"):
        crop_of(300, 255, 256, np.random.default_rng(0))


def coordinates(width, height):
    """An image whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_takes_the_square_in_the_square(flip):
    image = apply_crop(coordinates(60, 50), Crop(7, 3, 40, 40, 10, 20, flip), 16)
    x, y = np.arange(7 + 10, 7 + 10 + 16), np.arange(3 + 20, 3 + 20 + 16)
    array = np.asarray(image)
    assert image.size == (16, 16)
    assert (array[..., 0] == (x[::-1] if flip else x)).all()
    assert (array[..., 1] == y[:, None]).all()


def by_area(square, size):
    """The resize written out, pixel by pixel, in double precision: square (S, S, 3) -> (size, size, 3)."""
    side = len(square)
    scale = (side - 1) / (size - 1) if size > 1 else side / size  # align_corners

    def covered(i):
        """(pixel, length) of [i * scale, (i + 1) * scale); the last pixel is repeated."""
        start, end = i * scale, (i + 1) * scale
        for cell in range(math.floor(start), math.ceil(end)):
            yield min(cell, side - 1), min(cell + 1, end) - max(cell, start)

    result = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            for row, height in covered(y):
                for column, width in covered(x):
                    result[y, x] += height * width * square[row, column]
    return result / scale**2


def resized(image, size):
    """The whole image by `apply_crop`, as values."""
    return np.asarray(apply_crop(image, Crop(0, 0, image.width, size, 0, 0), size)).astype(int)


@pytest.mark.parametrize(
    ("side", "size"),
    [(8, 8), (13, 8), (17, 12), (31, 16), (40, 7), (24, 5), (23, 2), (6, 1), (2, 1), (37, 36)],
)
def test_a_resize_is_that_by_fractional_coverage(side, size):
    image = noise(side, side)
    expected = by_area(np.asarray(image).astype(float), size)
    tie = abs(expected % 1 - 0.5) < 1e-3  # single precision may round these either way
    wrong = (resized(image, size) != np.round(expected)) & ~tie
    assert not wrong.any()
    left, inner = size // 3, size - size // 3
    window = np.asarray(apply_crop(image, Crop(0, 0, side, size, left, 0, flip=True), inner)).astype(int)
    assert abs(window[:, ::-1] - expected[:inner, left:]).max() <= 0.501


def test_halves_are_rounded_to_even():
    """3 x 3 to 2 x 2 has a scale of 2, so the first pixel is the mean of four."""
    for total, expected in ((2, 0), (6, 2), (10, 2), (14, 4)):
        array = np.zeros((3, 3, 3), dtype=np.uint8)
        array[0, 0] = total
        assert resized(Image.fromarray(array), 2)[0, 0].tolist() == [expected] * 3


@pytest.mark.parametrize(("augment", "crop_of"), [("dvae", dvae_crop), ("transformer", transformer_crop)])
def test_transform_follows_its_listing(augment, crop_of):
    image = noise(60, 50)
    expected = apply_crop(image, crop_of(60, 50, 16, np.random.default_rng(4)), 16)
    first, again, other = (transform(image, 16, augment, np.random.default_rng(seed)) for seed in (4, 4, 5))
    assert first.tobytes() == again.tobytes() == expected.tobytes()
    assert other.tobytes() != first.tobytes()
    assert (first.size, first.mode) == ((16, 16), "RGB")


def test_other_transforms():
    array = np.asarray(transform(coordinates(60, 20), 20, "none", rng=None))  # the center crop
    assert (array[..., 0] == np.arange(20, 40)).all()
    with pytest.raises(ValueError, match="unknown augment 'clip'"):
        transform(coordinates(20, 20), 16, "clip", np.random.default_rng(0))
