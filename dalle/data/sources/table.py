"""Tables: CSV, TSV, JSONL and Parquet with a column of images and one or more of captions.

Images are paths, relative to the table or a given folder; in Parquet also the encoded bytes. Rows are read
once into an index of [file, name, image, captions], so memory holds none of them.
"""

import codecs
import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dalle.data.bad_samples import BadSampleError, examples_text
from dalle.data.config import IMAGE_SUFFIXES
from dalle.data.sources.captions import (
    IMAGE_NAMES,
    arrow_rows,
    check_column_names,
    check_utf8,
    choose_columns,
    find_name,
    flatten_captions,
)
from dalle.data.sources.image_folder import read_listed
from dalle.data.sources.index import IndexWriter, file_status, name_hash, open_or_build_index
from dalle.io.text import parse_json, read_lines
from dalle.types import RawSample

ROW = np.dtype([("share", "<u4"), ("at", "<u8"), ("size", "<u4")])
HEAD_ROWS = 10_000
"""Rows searched for columns: lines of JSON may lack some of them."""
LARGE_GROUP = 64 * 2**20
"""Bytes of a Parquet row group above which reading single images is slow."""
Row = tuple[str, str | tuple[int, int], list[str]]
"""Name, path of the image or (row group, row in it) of its bytes in Parquet, captions."""


class TableSource:
    """The rows of one or more tables with the same columns, in order.

    Relative paths start from `image_root`, or else from the folder of the first table. ValueError if a column
    is missing, or there is no row.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        image_root: Path | None = None,
        index_dir: Path | None = None,
    ):
        self.files, self._root = list(files), (image_root or files[0].parent).resolve()
        self.image_column, self.caption_column = image_column, caption_column
        kind = f"table {image_column} {caption_column}"
        self._status = list(map(file_status, files))
        self._index = open_or_build_index(files, kind, ROW, self._build, index_dir)
        self.hash, self.skipped = self._index.hash, self._index.skipped
        if not len(self):
            problem = f"{files[0]} holds no row with an image"
            raise ValueError(f"{problem}; bad samples {examples_text(self.skipped)}")

    def _build(self, writer: IndexWriter, files: Sequence[Path]) -> None:
        for number, file in enumerate(tqdm(files, desc="index", unit="file", disable=None, leave=False)):
            read_rows = _parquet_rows if file.suffix.lower() == ".parquet" else _text_rows
            rows = read_rows(file, self.image_column, self.caption_column, writer)
            while batch := list(islice(rows, 65536)):
                records = []
                for row in batch:
                    place = writer.add_text(json.dumps([number, *row]).encode())
                    records.append((name_hash(row[0]), *place))
                writer.add(np.array(records, ROW))

    def __len__(self) -> int:
        return len(self._index.samples)

    def _row(self, index: int) -> tuple[int, str, str | list[int], list[str]]:
        record = self._index.samples[index]
        place = f"row {index} of {self._index.path} (remove it, and it is made again)"
        return parse_json(self._index.text(record["at"], record["size"]), place)

    def name(self, index: int) -> str:
        return self._row(index)[1]

    def shares(self) -> np.ndarray:
        return self._index.samples["share"]

    def read(self, index: int) -> RawSample:
        file, name, image, captions = self._row(index)
        check_utf8(captions, name)
        if not isinstance(image, str):
            path, (group, row) = self.files[file], image
            try:
                if file_status(path) != self._status[file]:
                    raise ValueError("it has changed since its index was read; start again")
                image = _image_column(os.getpid(), path, group, self.image_column)[row].as_py()
            except Exception as error:  # a damaged file, or one that was replaced
                raise BadSampleError(name, "unreadable shard", f"{path}: {error}") from None
        return RawSample(name, read_listed(self._root, image, name), captions)

    def captions(self, index: int) -> list[str]:
        _, name, _, captions = self._row(index)
        return check_utf8(captions, name)


def _text_rows(file: Path, image: str | None, caption: str | None, writer: IndexWriter) -> Iterator[Row]:
    """The rows of CSV, TSV or JSONL; bad ones go to `writer.skipped`."""
    read = _read_jsonl if file.suffix.lower() in (".jsonl", ".ndjson") else partial(_read_csv, image=image)
    try:
        with file.open("rb") as opened:
            if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{file} is UTF-16, expected UTF-8; save it again (in Excel as CSV UTF-8)")
        columns = _find_columns(read(file), image, caption, str(file))
        for line, values in read(file):
            if isinstance(values, str):
                writer.skip(f"{file.name}:{line}", "broken row", values)
                continue
            columns = columns or choose_columns(list(values), image, caption, str(file))
            column, captions = columns
            path = values.get(column)
            if isinstance(path, str) and path.strip():
                path, texts = path.strip(), flatten_captions([values.get(name) for name in captions])
                yield path.replace("\\", "/"), path, texts
            else:
                writer.skip(f"{file.name}:{line}", "missing twin", "a row without an image")
    except OSError as error:
        writer.skip(file.name, "unreadable shard", error.strerror or str(error))
        writer.keep = False


def _find_columns(
    rows: Iterable[tuple[int, dict[str, Any] | str]], image: str | None, caption: str | None, table: str
) -> tuple[str, list[str]] | None:
    """The columns of the first rows that together have them; None if no row can be read."""
    names: dict[str, None] = {}
    for _, values in islice(rows, HEAD_ROWS):
        if not isinstance(values, str) and not values.keys() <= names.keys():
            names |= dict.fromkeys(values)
            with suppress(ValueError):
                return choose_columns(list(names), image, caption, table)
    return choose_columns(list(names), image, caption, table) if names else None


def _read_csv(file: Path, image: str | None = None) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(line, values by column), or (line, error); then the next line is read.

    A line of TSV with a quote that does not close, or is not doubled, is split at tabs alone.
    """
    tabs, ahead = file.suffix.lower() == ".tsv", list[str]()
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        lines = read_lines(opened)
        number, header = next(((n, line) for n, line in enumerate(lines, 1) if line.strip()), (1, ""))
        plain = re.sub('"[^"]*"', "", header)
        mark = "\t" if tabs else next((mark for mark in ",;\t" if mark in plain), ",")
        parse = partial(csv.reader, delimiter=mark, skipinitialspace=not tabs, strict=True)
        rows = parse(chain([header], lines))
        try:
            names = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(f"the first line of {file} must name the columns; it has {error}") from None
        check_column_names(names, str(file))
        image = image or find_name(names, IMAGE_NAMES)
        column = names.index(image) if image in names else 0

        def read_ahead() -> Iterator[str]:
            yield from ahead
            for line in lines:
                ahead.append(line)
                yield line

        used = rows.line_num
        while used:
            number += used
            rows = parse(read_ahead())
            try:
                row, problem = next(rows, []), ""
            except csv.Error as error:
                row, problem = [], f"a quote that does not close, or is not doubled: {error}"
            used = rows.line_num
            if len(row) != len(names) and "".join(row).strip():
                problem = f"{len(row)} fields, the header has {len(names)}"
            elif used > 1 and row and _holds_image(row, column, mark):
                problem = "a quote that does not close before the next row"
            if problem:
                used = 1
                row = [_unquote(field) for field in ahead[0].rstrip("\r\n").split(mark)] if tabs else []
            if row and len(row) == len(names):
                yield number, dict(zip(names, row, strict=True))
            elif problem:
                yield number, problem
            del ahead[:used]


def _holds_image(row: list[str], column: int, mark: str) -> bool:
    """Whether a field of several lines holds the image of another row, as if its quote did not close."""
    own = re.sub(r"\d+", "0", row[column])
    for place, field in enumerate(row):
        first, *more = re.split(r"[\r\n]+", field)
        if more and (place == column or (mark == "\t" and mark in "".join(more))):
            return True
        for line, at in [(first, column - place), *((line, column) for line in more)] if more else []:
            fields = line.split(mark)
            path = fields[at].strip() if 0 <= at < len(fields) > 1 else " "
            named = path.lower().endswith(IMAGE_SUFFIXES) and " " not in path
            if named or re.sub(r"\d+", "0", path) == own:
                return True
    return False


def _unquote(field: str) -> str:
    quoted = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if quoted else field


def _read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, values by key), or (line, error)."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(read_lines(lines), 1):
            if not line.strip():
                continue
            try:
                values = parse_json(line, "it")
            except ValueError as error:
                yield number, str(error)
            else:
                mapping = isinstance(values, dict)
                yield number, values if mapping else 'expected a mapping, as {"image": ..., "caption": ...}'


def _parquet_rows(file: Path, image: str | None, caption: str | None, writer: IndexWriter) -> Iterator[Row]:
    """The rows of a Parquet file, a row group at a time; embedded images are not read."""
    try:
        table = _open_parquet(file)
    except (OSError, ValueError) as error:
        writer.skip(file.name, "unreadable shard", str(error))
        writer.keep &= not isinstance(error, OSError)
        return
    names = table.schema_arrow.names
    check_column_names(names, str(file))
    column, captions = choose_columns(names, image, caption, str(file))
    dtype = table.schema_arrow.field(column).type
    dtype = dtype.value_type if hasattr(dtype, "index_type") else dtype  # a categorical of pandas
    paths = str(dtype) in ("string", "large_string", "string_view")
    wanted = list(dict.fromkeys([*captions, column] if paths else captions))
    start = 0
    for group in range(table.num_row_groups):
        try:
            batches = table.iter_batches(256, row_groups=[group], columns=wanted, use_threads=False)
            for row, values in enumerate(chain.from_iterable(map(arrow_rows, batches))):
                name = f"{file.name}/{start + row}"
                if values is None:
                    writer.skip(name, "caption not UTF-8", "or its path")
                    continue
                texts = flatten_captions([values[caption] for caption in captions])
                if not paths:
                    yield name, (group, row), texts
                elif values[column]:
                    yield values[column].replace("\\", "/"), values[column], texts
                else:
                    writer.skip(name, "missing twin", "a row without an image")
        except (OSError, ValueError) as error:
            writer.skip(f"{file.name}, row group {group}", "unreadable shard", str(error))
        start += table.metadata.row_group(group).num_rows
    sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    if not paths and max(sizes, default=0) > LARGE_GROUP:
        tqdm.write(
            f"note: {file} has row groups of {max(sizes) / 2**20:.0f} MiB, each read whole for one image; "
            "write it with row groups of about 100 rows, or as tars"
        )


@lru_cache(maxsize=2)
def _image_column(pid: int, file: Path, group: int, image: str | None) -> Any:
    """The images of one row group; each process reads its own."""
    table = _open_in_process(pid, file)
    column = image or find_name(table.schema_arrow.names, IMAGE_NAMES)
    return table.read_row_group(group, [column], use_threads=False).column(0)


@lru_cache(maxsize=16)
def _open_in_process(pid: int, file: Path) -> Any:
    return _open_parquet(file)


def _open_parquet(file: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError('Parquet needs pyarrow: pip install "zeroshot-text2image[data]"') from None
    return ParquetFile(file)
