"""Near-duplicate images: dalle/data/dedup.py."""

import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dalle.data.dedup import (
    DISTANCE,
    MAX_RMSE,
    find_copies,
    hamming_neighbors,
    image_hash,
    near_duplicate_groups,
    relative_rmse,
    thumbnail,
)
from tests.helpers.scenes import encoded, scene

SIZE = (200, 160)


def recompressed(image, scale=0.7, quality=60):
    size = round(image.width * scale), round(image.height * scale)
    smaller = image.resize(size, Image.Resampling.BICUBIC)
    return Image.open(io.BytesIO(encoded(smaller, "JPEG", quality=quality)))


def bits(a, b):
    return (a ^ b).bit_count()


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_has_nearly_the_same_hash_and_thumbnail(seed):
    image, other = scene(seed, SIZE), scene(seed + 100, SIZE)
    brighter = ImageEnhance.Brightness(image).enhance(0.95)
    for copy in (recompressed(image), recompressed(image, 2.5, 90), brighter):
        assert bits(image_hash(image), image_hash(copy)) <= DISTANCE
    assert relative_rmse(thumbnail(image), thumbnail(recompressed(image))) < MAX_RMSE
    assert relative_rmse(thumbnail(image), thumbnail(other)) > 5 * MAX_RMSE


def test_other_images_have_other_hashes():
    hashes = [image_hash(scene(seed, SIZE)) for seed in range(40)]
    assert min(bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > DISTANCE
    assert all(0 <= value < 2**64 for value in hashes)


@pytest.mark.parametrize(("row", "column"), [(0, 1), (3, 0), (2, 5), (7, 7)])
def test_a_wave_sets_the_bit_of_its_frequency(row, column):
    y, x = (np.arange(32) + 0.5) * np.pi / 32 * np.array([[row], [column]])
    wave = 128 + 100 * np.outer(np.cos(y), np.cos(x))
    assert image_hash(Image.fromarray(wave.round().astype(np.uint8))) == 1 << (63 - (8 * row + column))


@pytest.mark.parametrize("color", ["white", "black", "red"])
def test_flat_images_hash_to_zero_with_noise_too(color):
    noisy = np.asarray(Image.new("RGB", (64, 64), color)).astype(int)
    noisy = noisy + np.random.default_rng(0).integers(-2, 3, noisy.shape)
    assert image_hash(Image.new("RGB", (64, 64), color)) == 0
    assert image_hash(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == 0


def planted_hashes(count, planted, distance):
    """Random hashes, some of them copied with up to distance + 1 bits changed."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for _ in range(planted):
        source, target = rng.integers(count, size=2)
        flips = rng.choice(64, rng.integers(distance + 2), replace=False).astype(np.uint64)
        hashes[target] = hashes[source] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_neighbors_against_all_pairs(distance):
    hashes = planted_hashes(400, 150, distance)
    expected = [
        pair for pair in combinations(range(400), 2) if bits(*hashes[list(pair)].tolist()) <= distance
    ]
    assert len(expected) > 50
    assert list(map(tuple, hamming_neighbors(hashes, distance).tolist())) == expected


def test_neighbors_take_less_than_all_pairs(monkeypatch):
    compared, count = [], np.bitwise_count
    monkeypatch.setattr(np, "bitwise_count", lambda words: compared.append(len(words)) or count(words))
    hamming_neighbors(np.random.default_rng(0).integers(0, 2**64, 20000, dtype=np.uint64))
    assert sum(compared) < 20 * 20000  # all pairs would be 2e8


def test_groups_are_connected_by_steps():
    hashes = np.array([0, 0b11, 2**63, 0b1111, 0, 7 << 40], dtype=np.uint64)
    assert near_duplicate_groups(hashes, 2) == [[0, 1, 2, 3, 4]]
    assert near_duplicate_groups(hashes, 1) == [[0, 2, 4]]
    assert near_duplicate_groups(hashes, 0) == [[0, 4]]
    assert near_duplicate_groups(np.zeros(0, dtype=np.uint64)) == []
    assert near_duplicate_groups(np.full(1000, 5, dtype=np.uint64)) == [list(range(1000))]


def test_pale_drawings_are_compared_by_contrast_and_flat_images_by_color():
    drawings = np.full((2, 32, 32, 3), 255, dtype=np.uint8)
    drawings[0, 4:10, 4:10] = drawings[1, 20:26, 20:26] = 245
    assert relative_rmse(*drawings) > 1
    assert relative_rmse(drawings[0], drawings[0]) == 0
    white, nearly, red = (thumbnail(Image.new("RGB", (9, 9), c)) for c in ("white", "#fefefe", "red"))
    assert find_copies([white, white, red, red]) == [None, 0, None, 2]
    assert relative_rmse(white, nearly) == pytest.approx(1)


def test_each_copy_names_its_first():
    a, b = scene(0, SIZE), scene(1, SIZE)
    firsts = find_copies([thumbnail(i) for i in (a, b, recompressed(b), recompressed(a), a)])
    assert firsts == [None, None, 1, 0, 0]
