"""Decoding of images, broken and hostile ones included: dalle/data/image_decode.py."""

import contextlib
import re
import struct
import subprocess
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dalle.data import DataConfig, image_decode, open_dataset
from dalle.data.bad_samples import BadSampleError
from dalle.data.image_decode import decode, open_image
from dalle.data.sampler import epoch_stream
from dalle.data.transforms import transform
from dalle.io.images import FORMATS, load_image
from dalle.sampling import generator
from tests.helpers.formats import write_files
from tests.helpers.scenes import encoded


def noise(form="PNG", size=(64, 64)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), form)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "truncated"),
        (b"<html>404</html>", "wrong type"),
        (b"%PDF-1.7", "wrong type"),
        (noise("EPS"), "wrong type"),  # Pillow would start Ghostscript
        (b"\x89PNG\r\n\x1a\nrubbish", "unreadable image"),
        (noise("JPEG")[:600], "truncated"),
        (noise("PNG")[:600], "truncated"),
        (noise("GIF")[:1200], "truncated"),
        (noise("WEBP")[:600], "unreadable image"),
        (b"\xff\xd8\xff\xe0", "unreadable image"),
    ],
)
def test_causes_of_broken_images(data, cause):
    with pytest.raises(BadSampleError) as caught:
        decode(open_image(data, "a.png"), "a.png")
    assert (caught.value.name, caught.value.cause) == ("a.png", cause)


def test_a_png_with_too_much_text_is_refused_for_it(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2**10)
    text = PngImagePlugin.PngInfo()
    text.add_text("key", " " * 2**11, zip=True)
    with pytest.raises(BadSampleError, match="its text is larger"):
        open_image(encoded(Image.new("RGB", (9, 9)), "PNG", pnginfo=text), "a.png")


events: list[str] | None = None
"""What started a program while it is a list."""


def audit(event: str, arguments: tuple) -> None:
    programs = ("subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork")
    if events is not None and event.startswith(programs):
        events.append(event)


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    Image.init()
    sys.addaudithook(audit)
    monkeypatch.setitem(globals(), "events", [])
    for form in {*Image.SAVE} - {*FORMATS, "MPO"}:
        with contextlib.suppress(Exception):  # some write no RGB
            (tmp_path / f"{form}.png").write_bytes(noise(form))
    write_files(tmp_path, {path.with_suffix(".txt").name: "words" for path in tmp_path.iterdir()})
    assert (tmp_path / "EPS.txt").is_file()
    dataset = open_dataset(DataConfig(str(tmp_path), resolution=16, val_path=str(tmp_path)))
    batch = dataset.load([(0, i) for i in range(dataset.size)])
    assert {bad.cause for bad in batch.skipped} == {"wrong type"}
    for path in tmp_path.glob("*.png"):
        with pytest.raises(ValueError, match="expected one of JPEG"):
            load_image(path)
    assert events == []
    subprocess.run(["true"], check=True)
    assert events


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [20, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMATS)
def test_whatever_a_decoder_raises_the_image_is_named(form, count, monkeypatch):
    monkeypatch.setattr(image_decode, "MAX_PIXELS", 2**16)  # larger ones take long
    rng, whole = np.random.default_rng(0), noise(form)
    for number in range(count):
        start, length = rng.integers(len(whole)), 2 ** rng.integers(10)
        part = rng.bytes(length) if number % 2 else bytes(length)
        damaged = whole[:start] + part + whole[start + length :]
        with contextlib.suppress(BadSampleError):
            assert decode(open_image(damaged, "a"), "a").mode == "RGB"
    for share in (0, 0.05, 0.5, 0.9):
        with pytest.raises(BadSampleError, match="a: "):
            decode(open_image(whole[: int(share * len(whole))], "a"), "a")


def test_images_are_opened_in_a_list_of_formats():
    for place in ("dalle/**/*.py", "scripts/**/*.py", "notebooks/*.ipynb"):
        for path in Path(__file__).parents[2].glob(place):
            assert not re.search(r"Image\.open\((?!.*formats=)", path.read_text(encoding="utf-8")), path


def png_with_header(width: int, height: int) -> bytes:
    """A PNG whose header claims any size."""
    data = bytearray(noise(size=(8, 8)))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("size", [(10_000, 9_000), (17_000, 10_000), (60_000, 60_000)])
def test_more_than_ninety_megapixels_are_a_bomb(size):
    """Where Pillow only warns, also if that is an error, and where it refuses."""
    assert open_image(png_with_header(9459, 9459), "a.png").size == (9459, 9459)
    for action in ("ignore", "error"):
        with (
            warnings.catch_warnings(action=action),
            pytest.raises(BadSampleError, match=r"a\.png: decompression bomb"),
        ):
            open_image(png_with_header(*size), "a.png")


def test_a_jpeg_draft_is_small_and_looks_the_same():
    y, x = np.mgrid[:1200, :1600] / 1200
    pixels = (255 * np.stack([x / 1.34, y, 0.5 + 0 * x], -1)).astype(np.uint8)
    data = encoded(Image.fromarray(pixels), "JPEG", quality=95)
    small, large = (decode(open_image(data, "a"), "a", side) for side in (128, None))
    assert (small.size, large.size) == ((200, 150), (1600, 1200))
    difference = np.asarray(large.resize((200, 150), Image.Resampling.BOX), int) - np.asarray(small, int)
    assert abs(difference).max() <= 4
    unchanged = decode(open_image(noise("JPEG", (150, 100)), "a"), "a", 128)  # half is too small
    assert unchanged.size == (150, 100)


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_draft_is_decoded_on_request_and_never_in_evaluation(tmp_path, augment):
    data = noise("JPEG", (200, 160))
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "a.txt").write_text("noise")
    config = DataConfig(str(tmp_path), resolution=16, val_fraction=1e-9)
    datasets = [open_dataset(replace(config, jpeg_draft=draft)) for draft in (False, True)]
    results = [dataset.load([(0, 0)], augment, 3).pixels for dataset in datasets]
    for side, pixels in zip((None, 32), results, strict=True):
        rng = generator("crop", epoch_stream(3, 0), 0)
        crop = np.asarray(transform(decode(open_image(data, "a"), "a", side), 16, augment, rng), np.float32)
        np.testing.assert_array_equal(pixels[0], crop.transpose(2, 0, 1) / np.float32(255))
    assert abs(results[0] - results[1]).max() > 0.05
    np.testing.assert_array_equal(*(dataset.load([(0, 0)]).pixels for dataset in datasets))
