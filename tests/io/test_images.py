"""Images: dalle/io/images.py."""

import io
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.io.images import image_grid, load_image, resize_center_crop, to_pil, to_tensor

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]


def noise(width=20, height=24, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image, path, **options):
    image.save(path, **options)
    return path


def gray(*rows):
    """An image of gray values, or of colors."""
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def colors(image):
    """Of an image of one row."""
    return [tuple(color) for color in np.asarray(image)[0].tolist()]


def levels(image):
    """Gray values of an RGB image whose channels agree."""
    assert image.mode == "RGB"
    array = np.asarray(image)
    assert (array == array[..., :1]).all()
    return array[..., 0].tolist()


# Loading: whatever the file holds, an upright RGB image.


def test_a_path_may_be_a_string_and_an_image_stays_untouched(tmp_path):
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert levels(load_image(str(saved(image, tmp_path / "a.png")))) == [[255, 255], [255, 255]]
    assert levels(load_image(image)) == [[255, 255], [255, 255]]
    assert image.mode == "RGBA"


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (gray([0, 7], [200, 255]), [[0, 7], [200, 255]]),
        (gray([0, 255]).convert("1"), [[0, 255]]),
        (Image.merge("LA", (gray([100, 100, 100]), gray([0, 51, 255]))), [[255, 224, 100]]),  # over white
    ],
)
def test_gray_and_black_and_white_become_three_equal_channels(image, expected, tmp_path):
    assert levels(load_image(saved(image, tmp_path / "a.png"))) == expected


def test_alpha_is_laid_over_white(tmp_path):
    image = gray([(100, 0, 250, alpha) for alpha in (0, 51, 255)])
    loaded = load_image(saved(image, tmp_path / "a.png"))
    # 255 + (value - 255) * alpha / 255
    assert colors(loaded) == [(255, 255, 255), (224, 204, 254), (100, 0, 250)]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_the_transparent_color_of_a_palette_becomes_white(tmp_path, suffix):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    loaded = load_image(saved(image, tmp_path / f"a.{suffix}", transparency=1))
    assert colors(loaded) == [(10, 20, 30), (255, 255, 255), (0, 0, 0)]


def test_a_transparent_color_without_a_palette_becomes_white(tmp_path):
    image = gray([(9, 8, 7), (1, 2, 3)])
    loaded = load_image(saved(image, tmp_path / "a.png", transparency=(1, 2, 3)))
    assert colors(loaded) == [(9, 8, 7), (255, 255, 255)]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 257, 32767, 32768, 65535]], dtype=np.uint16))
    assert levels(load_image(saved(image, tmp_path / f"a.{suffix}"))) == [[0, 1, 127, 128, 255]]


@pytest.mark.parametrize("value", [-1, 70000])
def test_more_than_16_bits_are_refused_with_their_range(tmp_path, value):
    image = Image.fromarray(np.array([[0, value]], dtype=np.int32))
    with pytest.raises(ValueError, match=r"its values go from .* to .*; save it in 8 or 16 bits"):
        load_image(saved(image, tmp_path / "a.tif"))


def test_cmyk_becomes_rgb(tmp_path):
    loaded = load_image(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "a.jpg"))
    red, green, blue = loaded.getpixel((4, 4))
    assert (red > 250, green < 5, blue < 5) == (True, True, True)


# Where the first row and column of the stored image belong (EXIF); upright it is 1 2 3 / 4 5 6.
STORED = {
    1: ([1, 2, 3], [4, 5, 6]),  # top, left
    2: ([3, 2, 1], [6, 5, 4]),  # top, right
    3: ([6, 5, 4], [3, 2, 1]),  # bottom, right
    4: ([4, 5, 6], [1, 2, 3]),  # bottom, left
    5: ([1, 4], [2, 5], [3, 6]),  # left, top
    6: ([3, 6], [2, 5], [1, 4]),  # right, top
    7: ([6, 3], [5, 2], [4, 1]),  # right, bottom
    8: ([4, 1], [5, 2], [6, 3]),  # left, bottom
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(gray(*STORED[orientation]), tmp_path / "a.png", exif=exif)
    assert levels(load_image(load_image(path))) == [[1, 2, 3], [4, 5, 6]]  # turned once


# Entries of an EXIF block: the orientation 6, and a resolution that is text where a number belongs.
ENTRY = bytes.fromhex("0112 0003 00000001 00060000")
WRONG = bytes.fromhex("011a 0002 00000001 78000000")
DAMAGED = {
    "no header": b"nonsense",
    "wrong header": b"MM\0\x07\0\0\0\x08" + b"\0\x01" + ENTRY + bytes(4),
    "breaks off": b"MM\0\x2a\0\0\0\x08" + b"\0\x02" + ENTRY[:7],
    "wrong type": b"MM\0\x2a\0\0\0\x08" + b"\0\x02" + ENTRY + WRONG + bytes(4),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_an_exif_block_that_cannot_be_read_says_nothing(tmp_path, damage):
    path = saved(gray([1, 2, 3], [4, 5, 6]), tmp_path / "a.png", exif=damage)
    assert levels(load_image(path)) == [[1, 2, 3], [4, 5, 6]]


# What is no image, or not a whole one.


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("form", FORMATS)
def test_an_image_that_breaks_off_is_named(tmp_path, form):
    buffer = io.BytesIO()
    noise().save(buffer, form)
    path = tmp_path / f"broken.{form.lower()}"
    for share in (0, 0.05, 0.5, 0.9):
        path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
        with pytest.raises(ValueError, match=f"cannot read .*{path.name} as an image"):
            load_image(path)


def test_what_is_no_image_is_named(tmp_path):
    path = tmp_path / "words.png"
    path.write_text("a red square")
    files = {path: r"cannot read .*words\.png", tmp_path: "cannot read", tmp_path / "x": "no image at"}
    for place, words in files.items():
        with pytest.raises(ValueError, match=words):
            load_image(place)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAX_IMAGE_PIXELS", 100, "decompression bomb"),
        ("open", Mock(side_effect=ValueError("Invalid dimensions")), "Invalid dimensions"),
    ],
)
def test_what_pillow_refuses_is_named(name, value, words, tmp_path, monkeypatch):
    path = saved(noise(), tmp_path / "huge.png")
    monkeypatch.setattr(Image, name, value)
    with pytest.raises(ValueError, match=rf"cannot read .*huge\.png as an image: .*{words}"):
        load_image(path)


# The fixed crop of evaluation.


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((60, 30), (32, 16), (8, 0)), ((30, 45), (16, 24), (0, 4)), ((16, 16), (16, 16), (0, 0))],
)
def test_shorter_side_is_resized_by_lanczos_and_the_middle_cut_out(size, resized, corner):
    left, top = corner
    expected = noise(*size).resize(resized, Image.Resampling.LANCZOS).crop((left, top, left + 16, top + 16))
    difference = np.asarray(resize_center_crop(noise(*size), 16)).astype(int) - np.asarray(expected)
    assert abs(difference).mean() < 1  # rounding


def test_shorter_side_refuses_a_sliver():
    with pytest.raises(ValueError, match="image of 7 x 100 is too small; expected 8 pixels or more a side"):
        resize_center_crop(noise(7, 100), 16)


# To pixels and back.


def test_pixels_are_channels_first_in_0_to_1():
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    image.putpixel((2, 1), (0, 102, 0))
    pixels = to_tensor([image, noise(3, 2)])
    assert (pixels.shape, pixels.dtype) == ((2, 3, 2, 3), torch.float32)
    assert pixels[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    assert pixels[0, :, 1, 2].tolist() == pytest.approx([0, 0.4, 0])


def test_pixels_come_back_as_the_same_images():
    images = [noise(5, 4, seed) for seed in range(3)]
    back = to_pil(to_tensor(images))
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(images, back, strict=True))


def test_pixels_are_rounded_and_clamped():
    pixels = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.5]).expand(1, 3, 1, 5)
    assert levels(to_pil(pixels)[0]) == [[0, 0, 1, 255, 255]]


def test_a_sheet_holds_each_image_enlarged_without_smoothing():
    rows = [[noise(3, 2, 0), noise(3, 2, 1)], [noise(3, 2, 2)]]
    page = image_grid(rows, scale=2, gap=4)
    assert page.size == (2 * (6 + 4) + 4, 2 * (4 + 4) + 4)
    lower_left = np.asarray(page.crop((4, 12, 10, 16)))
    assert (lower_left == np.asarray(rows[1][0]).repeat(2, axis=0).repeat(2, axis=1)).all()
    assert (np.asarray(page.crop((14, 12, 24, 20))) == 255).all()
