"""Any captioned images as WebDataset tars: KEY.jpg (.png, .webp, ...) and KEY.txt, one caption a line.

The same source gives the same bytes: keys count from 0 in the source's order, and no member has a time or an
owner.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from dalle.types import DataSource, RawSample

SUFFIXES = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "MPO": "jpg",
}


@dataclass
class Packed:
    """What was written."""

    tars: int = 0
    """How many tars."""
    images: int = 0
    """Samples in them."""
    left_out: list[str] = field(default_factory=list)
    """What cannot be packed, each by name and cause."""


def write_tars(
    source: DataSource, folder: Path, shard_size: int = 10_000, said: Callable[[int], None] = int
) -> Packed:
    """Writes 00000.tar, 00001.tar, ... into a folder; each takes its name only when it is whole.

    Args:
        source: what to pack; an image's file is copied as it is, and captions are put in one line each.
        folder: made where there is none; must hold no tar.
        shard_size: samples a tar.
        said: called with the number of samples that were taken up, from time to time.

    Raises:
        ValueError: tars are there already, or nothing can be packed.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be positive, got {shard_size}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tars already; give an empty folder, or remove them")
    done = Packed()
    samples = _samples(source, done, said)
    first = next(samples, None)
    while first is not None:
        part = folder / f"{done.tars:05d}.tar.part"
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            written = 0
            while first is not None:
                for name, data in first:
                    _add(tar, name, data)
                written += 1
                first = next(samples, None)
                if written == shard_size:
                    break
        part.replace(part.with_suffix(""))
        done.tars, done.images = done.tars + 1, done.images + written
    if not done.images:
        more = f": {done.left_out[0]}" if done.left_out else ""
        raise ValueError(f"none of {len(source)} samples can be packed{more}")
    return done


def _samples(
    source: DataSource, done: Packed, said: Callable[[int], None]
) -> Iterator[list[tuple[str, bytes]]]:
    """The members of each sample that can be packed."""
    for index in range(len(source)):
        said(1)
        try:
            yield _members(source.read(index), f"{index:09d}")
        except ValueError as error:
            done.left_out.append(str(error))


def _members(record: RawSample, key: str) -> list[tuple[str, bytes]]:
    captions = [" ".join(caption.split()) for caption in record.captions]
    text = "\n".join(filter(None, captions))
    if not text:
        raise ValueError(f"{record.name}: no caption")
    return [(f"{key}.{_suffix(record)}", record.image), (f"{key}.txt", text.encode())]


def _suffix(record: RawSample) -> str:
    """By what the file is, whatever it is called."""
    try:
        with Image.open(io.BytesIO(record.image)) as image:
            kind = str(image.format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{record.name}: not an image ({error})") from None
    if kind not in SUFFIXES:
        raise ValueError(f"{record.name}: an image of type {kind}; expected {', '.join(SUFFIXES)}")
    return SUFFIXES[kind]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
