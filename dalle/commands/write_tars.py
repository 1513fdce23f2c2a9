"""WebDataset tars of captioned images in any format; large datasets read best from them.

python scripts/write_tars.py --path my/images --out my/tars
python scripts/write_tars.py --path coco.jsonl --out coco-tars --shard-size 5000

The members are KEY.jpg (.png, .webp, ...) and KEY.txt, one caption per line. The same data gives the same
bytes: keys count from 0 in their order, members have no time or owner.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from dalle.config import cli_errors, configuration, parse
from dalle.data.config import Format
from dalle.types import DataSource

SUFFIXES = {kind: kind.lower() for kind in ("PNG", "WEBP", "BMP", "GIF", "AVIF", "PPM", "QOI", "TGA", "DDS")}
SUFFIXES |= {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
"""Suffix of a member by the type of its image."""


@configuration
class WriteTarsArgs:
    """Packs captioned images in any format into tars that `--data.path` opens."""

    path: str | None = None
    """Captioned images, as for `--data.path`."""
    out: Path | None = None
    """Folder of the tars; must not hold any yet."""
    shard_size: int = 10_000
    """Samples per tar."""
    format: Format = "auto"
    """folder, table, tars or hub, if the path does not determine it."""
    image_column: str | None = None
    """Column of a table with the images; default: the first of the usual names."""
    caption_column: str | None = None
    """Column of a table, or key in JSON, with the captions; default: the first of the usual names."""
    image_root: str | None = None
    """Folder that a table's relative paths start from; default: the table's own."""


def run_write_tars(args: WriteTarsArgs) -> None:
    """Writes the tars and prints the samples that were left out."""
    from dalle.data.sources import open_source

    for name in ("path", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; for example --path my/table.csv --out my/tars")
    source = open_source(
        args.path, args.format, args.image_column, args.caption_column, image_root=args.image_root
    )
    tars, images, left_out = write_tars(source, args.out, args.shard_size)
    left_out += [f"{bad.name}: {bad.cause} ({bad.detail})" for bad in source.skipped]
    print(f"{args.out}: {images} images in {tars} tars; {len(left_out)} left out")
    for text in left_out[:5]:
        print(f"  {text}")


def write_tars(source: DataSource, folder: Path, shard_size: int = 10_000) -> tuple[int, int, list[str]]:
    """Writes 00000.tar, 00001.tar, ... into a folder; until all are complete they lie in its .partial/.

    Returns the number of tars, that of images, and the samples that cannot be packed, with the reason.

    Raises:
        ValueError: the folder holds tars, or no sample can be packed.
    """
    from dalle.io.files import check_result
    from dalle.train.checkpoint_saver import partial_directory

    if shard_size < 1:
        raise ValueError(f"shard_size must be positive, got {shard_size}")
    partial = check_result(folder) / ".partial"
    if any(folder.glob("*.tar")) and not partial.is_dir():
        raise ValueError(f"{folder} holds tars already; give an empty folder, or remove them")
    with partial_directory(partial):
        result = _write_partial(source, partial, shard_size)
        tars = {tar.name for tar in partial.glob("*.tar")}
        if foreign := [tar for tar in folder.glob("*.tar") if tar.name not in tars]:
            raise ValueError(f"{folder} holds other tars, such as {foreign[0].name}; give another --out")
        for name in sorted(tars):
            os.replace(partial / name, folder / name)
    return result


def _write_partial(source: DataSource, folder: Path, shard_size: int) -> tuple[int, int, list[str]]:
    tars, images, left_out = 0, 0, list[str]()
    samples = _samples(source, left_out)
    for first in samples:
        with tarfile.TarFile(folder / f"{tars:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for members in chain([first], islice(samples, shard_size - 1)):
                for name, data in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                images += 1
        tars += 1
    if not images:
        raise ValueError(f"none of {len(source)} samples can be packed: {'; '.join(left_out[:1])}")
    return tars, images, left_out


def _samples(source: DataSource, left_out: list[str]) -> Iterator[list[tuple[str, bytes]]]:
    """(name, bytes) of image and captions; the suffix follows the content, whatever the file is called."""
    from tqdm import tqdm

    from dalle.data.image_decode import open_image

    for index in tqdm(range(len(source)), "tars", unit="image", disable=None):
        try:
            sample = source.read(index)
            text = "\n".join(filter(None, (" ".join(caption.split()) for caption in sample.captions)))
            if not text:
                raise ValueError(f"{sample.name}: no caption")
            kind = open_image(sample.image, sample.name).format
            if kind not in SUFFIXES:
                raise ValueError(f"{sample.name}: an image of type {kind}; expected {', '.join(SUFFIXES)}")
            key = f"{index:09d}"
            members = [(f"{key}.{SUFFIXES[kind]}", sample.image), (f"{key}.txt", text.encode())]
        except ValueError as error:
            left_out.append(str(error))
            continue
        yield members


def main() -> None:
    """Command line of write_tars."""
    with cli_errors():
        run_write_tars(parse(WriteTarsArgs, description=__doc__))
