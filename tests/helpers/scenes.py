"""Smooth random images with large shapes in them, and datasets of them with bad samples."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.formats import write_files, write_tar

BAD = {
    2: "truncated",
    5: "wrong type",
    9: "caption not UTF-8",
    12: "empty caption",
    14: "broken tar member",
    17: "missing twin",
}
"""Bad samples among twenty, with their causes."""


def scene(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def put(folder: Path, name: str, image: Image.Image, caption: str) -> None:
    folder.mkdir(exist_ok=True)
    image.save(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def members(bad: dict[int, str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of twenty samples, some of them bad."""
    for i in range(20):
        image, text = encoded(scene(i)), f"an image with the number {i}".encode()
        image = {"truncated": image[:200], "wrong type": b"<html>"}.get(bad.get(i), image)
        text = {"caption not UTF-8": b"sch\xf6n", "empty caption": b"\n"}.get(bad.get(i), text)
        yield f"{i:02}.png", image
        if bad.get(i) != "missing twin":
            yield f"{i:02}.txt", text


def write_scenes(folder: Path, bad: dict[int, str]) -> Path:
    """A folder of `members`."""
    return write_files(folder, dict(members(bad)))


def write_scenes_tar(file: Path, bad: dict[int, str]) -> Path:
    """A tar of `members`, with damaged headers."""
    write_tar(file, list(members(bad)))
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        for i, cause in bad.items():
            if cause == "broken tar member":
                content[tar.getmember(f"{i:02}.png").offset + 130] ^= 0xFF
    file.write_bytes(content)
    return file
