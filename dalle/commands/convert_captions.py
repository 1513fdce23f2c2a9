"""A table of a public caption dataset and the images that you fetched of it; see docs/data.md.

python scripts/convert_captions.py --format coco --captions annotations/captions_train2017.json \
    --images train2017 --out coco.jsonl
python scripts/convert_captions.py --format redcaps --captions annotations --images images --out redcaps.jsonl
python scripts/convert_captions.py --format narratives --captions narratives --images open_images --out
open.jsonl
"""

import json
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from dalle.config import cli_errors, configuration, parse
from dalle.data.caption_datasets import CaptionRecord, Format, Naming, published_files, read_captions
from dalle.data.config import IMAGE_SUFFIXES
from dalle.io.text import NOT_UTF8

SCHEMA = """
pragma journal_mode=off;
pragma synchronous=off;
create table images (id integer primary key, path, path_stem, stem, number);
create table captions (image integer, caption text);
"""
"""A database on disk, so that memory does not grow. Nothing in it outlives the run: a crash may break it."""


@configuration
class ConvertCaptionsArgs:
    """Joins the published captions of a dataset with the images that you have of it."""

    format: Format | None = None
    """The dataset; `dalle/data/caption_datasets.py` describes its files."""
    captions: Path | None = None
    """The published file, or a folder of several."""
    images: Path | None = None
    """Folder of the images, at any depth."""
    out: Path = Path("table.jsonl")
    """The table; its paths are relative to it if the images are in its folder or below."""
    naming: Naming = "number"
    """File names of the images of cc and cc12m: the record's number from 0, or md5 or sha256 of the URL."""

    def __post_init__(self):
        if self.out.suffix != ".jsonl":
            raise ValueError(f"--out {self.out} must end in .jsonl, the format of the table")


@dataclass
class ConversionResult:
    """Counts of a conversion."""

    images: int = 0
    captions: int = 0
    without_caption: int = 0
    """Images of the folder without a record."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records that are not in the table, by cause."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first record of each cause."""

    def leave_out(self, cause: str, example: str) -> None:
        """Counts a record."""
        self.left_out[cause] += 1
        self.examples.setdefault(cause, example.encode(errors="replace").decode())

    def __str__(self) -> str:
        lines = [f"{self.images} images with {self.captions} captions; {self.without_caption} images without"]
        for cause, count in self.left_out.most_common():
            lines.append(f"left out, {cause}: {count} (first: {self.examples[cause]})")
        return "\n".join(lines)


def convert_captions(args: ConvertCaptionsArgs) -> ConversionResult:
    """Writes the table and prints what was left out.

    Raises:
        ValueError: captions in another format, or no record with an image.
    """
    from dalle.io.files import prepare_file, sync
    from dalle.train.checkpoint_saver import partial_directory

    for name in ("format", "captions", "images"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; docs/data.md has the command of each dataset")
    if not args.images.is_dir():
        raise ValueError(f"no folder {args.images}; expected the images of the dataset, already fetched")
    files = published_files(args.captions, args.format)
    if args.format in ("cc", "cc12m") and args.naming == "number" and len(files) > 1:
        raise ValueError(f"{args.captions} has {len(files)} files, each counts from 0; convert one at a time")
    result, images = ConversionResult(), args.images.resolve()
    prepare_file(args.out)
    folder = args.out.resolve().parent
    start = folder if images.is_relative_to(folder) else images  # where the paths in the table start
    with partial_directory(folder / f".partial-{args.out.stem}") as partial:
        table = partial / "table.jsonl"
        try:
            with closing(sqlite3.connect(partial / "pairs.sqlite")) as database:
                database.executescript(SCHEMA)
                _insert_images(database, args.images, result)
                _insert_captions(database, args, files, result)
                _write_table(database, images.relative_to(start), table, result)
        except sqlite3.Error as error:
            raise ValueError(f"cannot write {partial} ({error}); free disk space and run again") from None
        if not result.images:
            raise ValueError(f"no record of {args.captions} finds an image in {args.images}\n{result}")
        sync(table)
        table.replace(args.out)
    flags = f"--data.path {args.out}"
    if start != folder:
        flags += f" --data.image-root {args.images}"
    print(f"{args.out}: {result}\nopen it by {flags}")
    return result


def _insert_images(database: sqlite3.Connection, root: Path, result: ConversionResult) -> None:
    rows = tqdm(_find_images(root, result), desc="images", unit="image", disable=None)
    database.executemany("insert into images values (null, ?, ?, ?, ?)", rows)
    for column in ("path", "path_stem", "stem", "number"):
        database.execute(f"create index by_{column} on images ({column})")


def _find_images(root: Path, result: ConversionResult) -> Iterator[tuple[str, str, str, str | None]]:
    """Path below the root, the same without suffix, stem, and the stem as a number without leading zeros."""
    walk = os.walk(root, onerror=lambda error: result.leave_out("unreadable folder", error.filename))
    for folder, folders, files in walk:
        folders.sort()
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            path = Path(folder, file).relative_to(root).as_posix()
            if NOT_UTF8.search(path):
                result.leave_out("a file name that is not UTF-8", path)
            else:
                yield path, path.removesuffix(suffix), stem, _number(stem)


def _number(stem: str) -> str | None:
    return (stem.lstrip("0") or "0") if stem.isascii() and stem.isdigit() else None


def _insert_captions(
    database: sqlite3.Connection, args: ConvertCaptionsArgs, files: list[Path], result: ConversionResult
) -> None:
    root = args.captions if args.captions.is_dir() else None
    with tqdm(desc=f"{args.format} records", unit="record", disable=None) as bar:
        for file in files:
            try:
                for record in read_captions(file, args.format, args.naming, root):
                    bar.update()
                    _insert_record(database, record, result)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"cannot read {file}: {error}") from None


def _insert_record(database: sqlite3.Connection, record: CaptionRecord, result: ConversionResult) -> None:
    if record.name is None:
        result.leave_out("not readable", record.captions[0])
    elif not record.captions:
        result.leave_out("no caption", record.name)
    elif NOT_UTF8.search(record.name + "".join(record.captions)):
        result.leave_out("not UTF-8", record.name)
    elif not (found := _find_image(database, record.name)):
        result.leave_out("no such image", record.name)
    elif len(found) > 1:
        result.leave_out("several images of that name", record.name)
    else:
        rows = [(found[0], caption) for caption in record.captions]
        database.executemany("insert into captions values (?, ?)", rows)


def _find_image(database: sqlite3.Connection, name: str) -> list[int]:
    """Ids of the images with that path, else that path but the suffix, else that stem, else that number.

    A name with folders means one path below the root; without, a file in any folder.
    """
    stem, suffix = os.path.splitext(name)
    stem = stem if suffix.lower() in IMAGE_SUFFIXES else name
    keys = {"path": name, "path_stem": stem}
    if "/" not in name:
        keys |= {"stem": stem, "number": _number(stem)}
    for column, value in keys.items():
        found = database.execute(f"select id from images where {column} = ? limit 2", (value,)).fetchall()
        if found:
            return [row[0] for row in found]
    return []


def _write_table(database: sqlite3.Connection, prefix: Path, path: Path, result: ConversionResult) -> None:
    pairs = database.execute(
        "select path, caption from captions join images on images.id = image order by path, captions.rowid"
    )
    with path.open("w", encoding="utf-8") as table:
        for image, rows in groupby(pairs, key=lambda row: row[0]):
            captions = list(dict.fromkeys(caption for _, caption in rows))
            row = {"image": (prefix / image).as_posix(), "captions": captions}
            table.write(json.dumps(row, ensure_ascii=False) + "\n")
            result.images += 1
            result.captions += len(captions)
    total = database.execute("select count(*) from images").fetchone()[0]
    result.without_caption = total - result.images


def main() -> None:
    """Command line of convert_captions."""
    with cli_errors():
        convert_captions(parse(ConvertCaptionsArgs, description=__doc__))
