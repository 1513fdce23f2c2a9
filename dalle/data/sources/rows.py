"""The rows of CSV, TSV and JSONL, one after another; what cannot be read is noted and passed over."""

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dalle.data.sources.captions import check_names, choose_columns, listed
from dalle.data.sources.index import Writer
from dalle.types import BadSample

LOOKED_AT = 10_000
"""Rows in which columns are looked for, at most: lines of JSON may lack some of them."""


class Row(NamedTuple):
    """A row as it is indexed: its name, always with slashes; its image's path as it stands there; its captions.
    `image` is None where the bytes stand in row `row` of a row group of Parquet."""

    name: str
    image: str | None
    captions: list[str]
    group: int = 0
    row: int = 0


def text_rows(file: Path, image: str | None, caption: str | None, writer: Writer) -> Iterator[Row]:
    """The rows of CSV, TSV or JSONL; one that cannot be read is noted and passed over."""
    read = json_values if file.suffix.lower() in (".jsonl", ".ndjson") else csv_values
    try:
        _check_encoding(file)
        columns = _find_columns(read(file), image, caption, str(file))
        for line, values in read(file):
            if isinstance(values, str):
                writer.skipped.append(BadSample(None, f"{file.name}:{line}", "broken row", values))
                continue
            columns = columns or choose_columns(list(values), image, caption, str(file))
            path = values.get(columns[0])
            if not isinstance(path, str) or not path.strip():
                writer.skipped.append(
                    BadSample(None, f"{file.name}:{line}", "missing twin", "a row without an image")
                )
                continue
            path = path.strip()
            yield Row(path.replace("\\", "/"), path, listed([values.get(column) for column in columns[1]]))
    except OSError as error:
        writer.skipped.append(BadSample(None, file.name, "unreadable shard", error.strerror or str(error)))
        writer.keep = False


def _find_columns(
    rows: Iterable[tuple[int, dict[str, Any] | str]], image: str | None, caption: str | None, place: str
) -> tuple[str, list[str]] | None:
    """The columns of the first rows that together have them; None where no row can be read."""
    names: dict[str, None] = {}
    problem: ValueError | None = None
    for _, values in islice(rows, LOOKED_AT):
        if isinstance(values, str) or values.keys() <= names.keys():
            continue
        names |= dict.fromkeys(values)
        try:
            return choose_columns(list(names), image, caption, place)
        except ValueError as error:
            problem = error
    if problem:
        raise problem
    return None


def _check_encoding(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ValueError(f"{file} is UTF-16, expected UTF-8; save it anew (in Excel as CSV UTF-8)")


def csv_values(file: Path) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(line, values by column), or (line, what is wrong). Quotes mean nothing in TSV, but around a whole field."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        marks = re.sub('"[^"]*"', "", lines.readline())
        lines.seek(0)
        tabs = file.suffix.lower() == ".tsv"
        mark = "\t" if tabs else "," if "," in marks or ";" not in marks else ";"
        quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        rows = csv.reader(lines, delimiter=mark, quoting=quoting, skipinitialspace=not tabs)
        try:
            names = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise ValueError(
                f"the first line of {file} cannot be read ({error}); it must name the columns"
            ) from None
        check_names(names, str(file))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield rows.line_num, str(error)
                continue
            if not row:
                continue
            if len(row) != len(names):
                yield rows.line_num, f"{len(row)} fields, the header has {len(names)}"
                continue
            yield rows.line_num, dict(zip(names, map(_unquote, row) if tabs else row, strict=True))


def _unquote(field: str) -> str:
    whole = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if whole else field


def json_values(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, values by key), or (line, what is wrong)."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"no JSON: {error}"
                continue
            yield (
                number,
                values
                if isinstance(values, dict)
                else 'expected a mapping, as {"image": ..., "caption": ...}',
            )
