"""Smooth random images with large shapes in them, and files of them; shared by the tests of data checks."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


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
