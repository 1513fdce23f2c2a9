"""Images: dalle/io/images.py."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from dalle.io.images import image_grid, load_image, resize_center_crop, to_pil, to_tensor


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


def test_a_path_may_be_a_string_or_an_array_and_an_image_stays_untouched(tmp_path):
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert levels(load_image(str(saved(image, tmp_path / "a.png")))) == [[255, 255], [255, 255]]
    assert levels(load_image(image)) == [[255, 255], [255, 255]]
    assert image.mode == "RGBA"
    assert load_image(np.asarray(noise())) == noise()
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\), got float32 \(4, 4, 3\)"):
        load_image(np.zeros((4, 4, 3), np.float32))


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


@pytest.mark.parametrize(
    ("size_bits_type", "key", "row", "expected"),
    [
        ((4, 1, 2, 0), "0001", "1b", [0, 255, 170, 255]),
        ((3, 1, 16, 0), "012c", "0000 012c ffff", [0, 255, 255]),
        ((2, 1, 16, 2), "012c 012c 012c", "012c 012c 012c 0200 0200 0200", [255, 2]),
    ],
)
def test_a_transparent_color_of_a_png_becomes_white(tmp_path, size_bits_type, key, row, expected):
    header, pixels = struct.pack(">IIBBxxx", *size_bits_type), zlib.compress(bytes.fromhex("00" + row))
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"tRNS" + bytes.fromhex(key), b"IDAT" + pixels, b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(png)
    assert levels(load_image(tmp_path / "a.png")) == [expected]


def test_colors_of_an_icc_profile_become_srgb_and_a_long_text_is_no_bomb(tmp_path):
    srgb, text = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), PngInfo()
    text.add_text("words", "x" * 2**21, zip=True)
    other = srgb.replace(b"\0s\0R", b"\0x\0x")  # its description
    for old, new in ((b"rXYZ", b"xxxx"), (b"gXYZ", b"rXYZ"), (b"xxxx", b"gXYZ")):
        other = other.replace(old, new)
    for profile, color in ((srgb, (255, 0, 0)), (other, (0, 255, 0)), (b"damaged", (255, 0, 0))):
        path = saved(gray([(255, 0, 0)]), tmp_path / "a.png", icc_profile=profile, pnginfo=text)
        assert colors(load_image(load_image(path))) == [color]


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


def test_what_is_no_image_is_named(tmp_path):
    path = tmp_path / "words.png"
    path.write_text("a red square")
    files = {path: r"cannot read .*words\.png", tmp_path: "cannot read", tmp_path / "x": "no image at"}
    for place, words in files.items():
        with pytest.raises(ValueError, match=words):
            load_image(place)


def test_what_pillow_refuses_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"cannot read .*huge\.png as an image: .*decompression bomb"):
        load_image(saved(noise(), tmp_path / "huge.png"))


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
    with pytest.raises(ValueError, match="image of 7 x 100 is too small; expected 8 pixels or more"):
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
