"""Turn the captions of a public set, and the images that you fetched of it, into a table; see docs/data.md.

python scripts/convert_captions.py --format coco --captions annotations/captions_train2017.json     --images train2017 --out coco.jsonl
python scripts/convert_captions.py --format redcaps --captions annotations --images images --out redcaps.jsonl
python scripts/convert_captions.py --format narratives --captions narratives --images open_images --out open.jsonl
"""

import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from dalle.config import cli_errors, parse
from dalle.data.caption_datasets import CaptionRecord, Format, Naming, published_files, read_published

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MEMORY = 65536  # KiB that the database keeps


@dataclass(frozen=True)
class ConvertCaptionsArgs:
    """Turns the published captions of a public set, and the images that you have of it, into a table."""

    format: Format | None = None
    """Whose captions; `dalle/data/caption_datasets.py` shows what each file looks like."""
    captions: Path | None = None
    """The published file, or a folder of several."""
    images: Path | None = None
    """Folder of the images, in any folders below it."""
    out: Path = Path("table.jsonl")
    """The table; put it into the folder of the images, or above it, and its paths start at its own place."""
    naming: Naming = "number"
    """How the images of cc and cc12m are called: by the record's number from 0, or by md5 or sha256 of the URL."""

    def __post_init__(self):
        if self.out.suffix != ".jsonl":
            raise ValueError(f"--out {self.out} must end in .jsonl, which the table is")


@dataclass
class Converted:
    """What became of images and records."""

    images: int = 0
    """Rows written, one an image."""
    captions: int = 0
    """Captions in them."""
    without_caption: int = 0
    """Images of the folder that no record names."""
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
        lines += [
            f"left out, {cause}: {n} (first: {self.examples[cause]})"
            for cause, n in self.left_out.most_common()
        ]
        return "\n".join(lines)


def convert_captions(run: ConvertCaptionsArgs) -> Converted:
    """Writes the table and says what was missing.

    Raises:
        ValueError: captions of another format, or no record that finds an image.
    """
    from dalle.io.files import make_directory

    for name in ("format", "captions", "images"):
        if getattr(run, name) is None:
            raise ValueError(f"--{name} is missing; --help shows commands, docs/data.md those for each set")
    if not run.images.is_dir():
        raise ValueError(f"no folder {run.images}; expected the images of the set, already fetched")
    files = published_files(run.captions, run.format)
    if run.format in ("cc", "cc12m") and run.naming == "number" and len(files) > 1:
        raise ValueError(f"{run.captions} has {len(files)} files, each counts from 0; convert one at a time")
    make_directory(run.out.resolve().parent)
    done = Converted()
    with tempfile.TemporaryDirectory(dir=run.out.resolve().parent, prefix=".converting-") as folder:
        database = sqlite3.connect(Path(folder) / "pairs.sqlite")
        try:
            _prepare(database, folder)
            _enter_images(database, run.images, done)
            _enter_captions(database, run, files, done)
            _write_table(database, run, Path(folder) / "table.jsonl", done)
        finally:
            database.close()
    words = f"--data.path {run.out}"
    if _start_of_paths(run) != run.out.resolve().parent:
        words += f" --data.image-root {run.images}"
    print(f"{run.out}: {done}\nopen it by {words}")
    return done


def _prepare(database: sqlite3.Connection, folder: str) -> None:
    """Nothing in it outlives the run, so it need not be safe from a crash."""
    database.isolation_level = None
    for setting in ("journal_mode=off", "synchronous=off", "locking_mode=exclusive", f"cache_size=-{MEMORY}"):
        database.execute(f"pragma {setting}")
    database.execute(
        "create table images (id integer primary key, path text, place text, stem text, number text)"
    )
    database.execute("create table captions (image integer, caption text)")


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def _enter_images(database: sqlite3.Connection, folder: Path, done: Converted) -> None:
    rows = tqdm(_images(folder, done), desc="images", unit="image", disable=None)
    database.execute("begin")
    database.executemany("insert into images (path, place, stem, number) values (?, ?, ?, ?)", rows)
    database.execute("commit")
    for column in ("path", "place", "stem", "number"):
        database.execute(f"create index by_{column} on images ({column})")


def _images(root: Path, done: Converted) -> Iterator[tuple[str, str, str, str | None]]:
    """Path below the root, the same without suffix, stem, and the stem as a number without leading zeros."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in PICTURES:
                continue
            path = Path(folder, file).relative_to(root).as_posix()
            if _is_text(path):
                yield path, path.removesuffix(suffix), stem, _number(stem)
            else:
                done.leave_out("a file name that is not UTF-8", path)


def _number(stem: str) -> str | None:
    return (stem.lstrip("0") or "0") if stem.isascii() and stem.isdigit() else None


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: bytes that were no text
        return False
    return True


def _find(database: sqlite3.Connection, name: str) -> list[int]:
    """The images that a record may mean: that path, else that place, else that stem, else that number.

    A name with folders in it means one place below the root; without, a file in any folder.
    """
    place, suffix = os.path.splitext(name)
    place = place if suffix.lower() in PICTURES else name
    asked = [("path", name), ("place", place)]
    if "/" not in name:
        asked += [("stem", place), ("number", _number(place))]
    for column, value in asked:
        found = database.execute(f"select id from images where {column} = ? limit 2", (value,)).fetchall()
        if found:
            return [row[0] for row in found]
    return []


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


def _enter_captions(
    database: sqlite3.Connection, run: ConvertCaptionsArgs, files: list[Path], done: Converted
) -> None:
    root = run.captions if run.captions.is_dir() else None
    database.execute("begin")
    with tqdm(desc=f"{run.format} records", unit="record", disable=None) as bar:
        for file in files:
            try:
                for record in read_published(file, run.format, run.naming, root):
                    bar.update()
                    _enter(database, record, done)
            except (OSError, EOFError) as error:
                raise ValueError(f"cannot read {file}: {error}") from None
    database.execute("commit")


def _enter(database: sqlite3.Connection, record: CaptionRecord, done: Converted) -> None:
    if record.name is None:
        done.leave_out("not readable", record.captions[0])
    elif not record.captions:
        done.leave_out("no caption", record.name)
    elif not _is_text(record.name + "".join(record.captions)):
        done.leave_out("not UTF-8", record.name)
    elif not (found := _find(database, record.name)):
        done.leave_out("no such image", record.name)
    elif len(found) > 1:
        done.leave_out("several images of that name", record.name)
    else:
        rows = [(found[0], caption) for caption in record.captions]
        database.executemany("insert into captions values (?, ?)", rows)


# ---------------------------------------------------------------------------------------------
# Table
# ---------------------------------------------------------------------------------------------


def _write_table(database: sqlite3.Connection, run: ConvertCaptionsArgs, part: Path, done: Converted) -> None:
    total = database.execute("select count(*) from images").fetchone()[0]
    chosen = database.execute(
        "select path, caption from captions join images on images.id = image order by path, captions.rowid"
    )
    prefix = run.images.resolve().relative_to(_start_of_paths(run))
    with part.open("w", encoding="utf-8") as table:
        for path, rows in groupby(chosen, key=lambda row: row[0]):
            captions = list(dict.fromkeys(caption for _, caption in rows))
            row = {"image": (prefix / path).as_posix(), "captions": captions}
            table.write(json.dumps(row, ensure_ascii=False) + "\n")
            done.images += 1
            done.captions += len(captions)
        table.flush()
        os.fsync(table.fileno())
    done.without_caption = total - done.images
    if not done.images:
        there = database.execute("select path from images limit 1").fetchone()
        lies = f"{total} images lie there, as {there[0]}" if there else f"no {', '.join(PICTURES)} lies there"
        raise ValueError(f"no record of {run.captions} finds an image in {run.images} ({lies})\n{done}")
    part.replace(run.out)


def _start_of_paths(run: ConvertCaptionsArgs) -> Path:
    """Where the paths in the table start: its own folder if the images lie in or below it, else theirs."""
    table, images = run.out.resolve().parent, run.images.resolve()
    return table if images.is_relative_to(table) else images


def main() -> None:
    """Command line of convert_captions."""
    with cli_errors():
        convert_captions(parse(ConvertCaptionsArgs, description=__doc__))
