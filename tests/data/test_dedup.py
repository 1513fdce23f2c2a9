"""Images that are there twice: dalle/data/dedup.py."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from dalle.data.dedup import (
    DISTANCE,
    LIKENESS,
    alike,
    copies,
    image_hash,
    near_pairs,
    small_copy,
    unlikeness,
)


def scene(seed, width=200, height=160):
    """A smooth image with large things in it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def saved_anew(image, scale=0.7, quality=60):
    smaller = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    buffer = io.BytesIO()
    smaller.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def bits(a, b):
    return (a ^ b).bit_count()


# Hashes.


@pytest.mark.parametrize("seed", range(8))
def test_a_copy_has_nearly_the_same_hash(seed):
    image = scene(seed)
    for copy in (saved_anew(image), saved_anew(image, 2.5, 90), ImageEnhance.Brightness(image).enhance(0.95)):
        assert bits(image_hash(image), image_hash(copy)) <= DISTANCE


def test_other_images_have_other_hashes():
    hashes = [image_hash(scene(seed)) for seed in range(40)]
    assert min(bits(a, b) for i, a in enumerate(hashes) for b in hashes[:i]) > DISTANCE
    assert all(0 <= value < 2**64 for value in hashes)


def test_a_hash_is_by_frequencies():
    """One wave across: its bit, and no other; the first bit, of the brightness, is never set."""
    for row, column in ((0, 1), (3, 0), (2, 5), (7, 7)):
        y, x = (np.arange(32) + 0.5) * np.pi / 32 * np.array([[row], [column]])
        wave = 128 + 100 * np.outer(np.cos(y), np.cos(x))
        expected = 1 << (63 - (8 * row + column))
        assert image_hash(Image.fromarray(wave.round().astype(np.uint8))) == expected


@pytest.mark.parametrize("color", ["white", "black", "red"])
def test_flat_images_hash_to_nothing(color):
    noisy = np.asarray(Image.new("RGB", (64, 64), color)).astype(int)
    noisy = noisy + np.random.default_rng(0).integers(-2, 3, noisy.shape)
    assert image_hash(Image.new("RGB", (64, 64), color)) == 0
    assert image_hash(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))) == 0


# The search.


def random_hashes(count, planted, distance, seed=0):
    """Random hashes, some of them copied with up to `distance` bits changed."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for _ in range(planted):
        source, target = rng.integers(count, size=2)
        flips = rng.choice(64, rng.integers(distance + 2), replace=False)
        hashes[target] = hashes[source] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=0
        )
    return hashes


@pytest.mark.parametrize("distance", [0, 1, 2, 4, 7])
def test_the_search_finds_what_comparing_all_with_all_finds(distance):
    hashes = random_hashes(400, 150, distance)
    values = hashes.tolist()
    expected = [
        (i, j) for i in range(400) for j in range(i + 1, 400) if bits(values[i], values[j]) <= distance
    ]
    assert len(expected) > 50
    assert list(map(tuple, near_pairs(hashes, distance).tolist())) == expected


def test_pairs_that_differ_anywhere_are_found():
    """Whichever bits differ, two bands agree."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        flips = sum(1 << int(bit) for bit in rng.choice(64, DISTANCE, replace=False))
        value = int(rng.integers(2**64, dtype=np.uint64))
        assert near_pairs(np.array([value, value ^ flips], dtype=np.uint64)).tolist() == [[0, 1]]


def test_groups_are_joined_by_steps():
    hashes = np.array([0, 0b11, 2**63, 0b1111, 0, 7 << 40], dtype=np.uint64)
    assert alike(hashes, 2) == [[0, 1, 2, 3, 4]]
    assert alike(hashes, 1) == [[0, 2, 4]]
    assert alike(hashes, 0) == [[0, 4]]
    assert alike(np.zeros(0, dtype=np.uint64)) == []


def test_the_search_is_not_quadratic(monkeypatch):
    """Of random hashes hardly any are compared."""
    from dalle.data import dedup as duplicates

    compared = []
    count_bits = duplicates._count_bits
    monkeypatch.setattr(
        duplicates, "_count_bits", lambda words: compared.append(len(words)) or count_bits(words)
    )
    near_pairs(np.random.default_rng(0).integers(0, 2**64, 20000, dtype=np.uint64))
    assert sum(compared) < 20 * 20000  # all with all would be 2e8


def test_a_thousand_equal_ones_are_one_group():
    assert alike(np.full(1000, 5, dtype=np.uint64)) == [list(range(1000))]


@pytest.mark.parametrize("distance", [-1, 31])
def test_a_distance_that_means_nothing_is_refused(distance):
    with pytest.raises(ValueError, match="distance must be 0 to 30"):
        near_pairs(np.zeros(2, dtype=np.uint64), distance)


# The decision.


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_is_like_its_original_and_others_are_not(seed):
    image = scene(seed)
    assert unlikeness(small_copy(image), small_copy(saved_anew(image))) < LIKENESS
    assert unlikeness(small_copy(image), small_copy(scene(seed + 100))) > 5 * LIKENESS


def test_pale_drawings_are_compared_by_what_is_drawn():
    """A few pale pixels on white: close in every pixel, and yet not alike."""
    drawings = []
    for place in (4, 20):
        array = np.full((32, 32, 3), 255, dtype=np.uint8)
        array[place : place + 6, place : place + 6] = 245
        drawings.append(array)
    assert unlikeness(*drawings) > 1
    assert unlikeness(drawings[0], drawings[0]) == 0


def test_flat_images_are_compared_by_color():
    white, nearly, red = (small_copy(Image.new("RGB", (9, 9), c)) for c in ("white", "#fefefe", "red"))
    assert copies([white, white, red, red]) == [None, 0, None, 2]
    assert unlikeness(white, nearly) == pytest.approx(1)


def test_each_copy_names_the_first_of_its_kind():
    a, b = scene(0), scene(1)
    images = [small_copy(image) for image in (a, b, saved_anew(b), saved_anew(a), a)]
    assert copies(images) == [None, None, 1, 0, 0]


def test_channels_and_modes_do_not_matter():
    grey = scene(0).convert("L")
    assert image_hash(grey) == image_hash(grey.convert("RGB"))
    assert (small_copy(grey) == small_copy(grey.convert("RGB"))).all()
