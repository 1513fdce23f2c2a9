"""WebDataset tars of captioned images: KEY.jpg (.png, .webp, ...) and KEY.txt, one caption per line.

The same source gives the same bytes: keys count from 0 in the order of the source, members have no time or
owner.
"""

import io
import tarfile
from collections.abc import Callable
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
class WrittenTars:
    """What `write_tars` has written."""

    tars: int = 0
    images: int = 0
    left_out: list[str] = field(default_factory=list)
    """Samples that cannot be packed, with the reason."""


def write_tars(
    source: DataSource, folder: Path, shard_size: int = 10_000, progress: Callable[[int], None] = int
) -> WrittenTars:
    """Writes 00000.tar, 00001.tar, ... into a folder; a tar gets its name when it is complete.

    Args:
        source: image files are copied as they are, captions put on one line each.
        folder: created if missing; must not hold any tar.
        shard_size: samples per tar.
        progress: called with the number of samples read since the last call.

    Raises:
        ValueError: the folder holds tars, or no sample can be packed.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be positive, got {shard_size}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds tars already; give an empty folder, or remove them")
    done = WrittenTars()
    tar = None
    for index in range(len(source)):
        progress(1)
        try:
            members = _members(source.read(index), f"{index:09d}")
        except ValueError as error:
            done.left_out.append(str(error))
            continue
        if tar is None:
            part = folder / f"{done.tars:05d}.tar.part"
            tar = tarfile.TarFile(part, "w", format=tarfile.USTAR_FORMAT)
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        done.images += 1
        if done.images % shard_size == 0:
            _finish(tar, part, done)
            tar = None
    if tar is not None:
        _finish(tar, part, done)
    if not done.images:
        first = f": {done.left_out[0]}" if done.left_out else ""
        raise ValueError(f"none of {len(source)} samples can be packed{first}")
    return done


def _finish(tar: tarfile.TarFile, part: Path, done: WrittenTars) -> None:
    tar.close()
    part.replace(part.with_suffix(""))
    done.tars += 1


def _members(sample: RawSample, key: str) -> list[tuple[str, bytes]]:
    """(name, bytes) of image and captions; the suffix follows the content, whatever the file is called."""
    captions = [" ".join(caption.split()) for caption in sample.captions]
    text = "\n".join(filter(None, captions))
    if not text:
        raise ValueError(f"{sample.name}: no caption")
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            kind = str(image.format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{sample.name}: not an image ({error})") from None
    if kind not in SUFFIXES:
        raise ValueError(f"{sample.name}: an image of type {kind}; expected {', '.join(SUFFIXES)}")
    return [(f"{key}.{SUFFIXES[kind]}", sample.image), (f"{key}.txt", text.encode())]
