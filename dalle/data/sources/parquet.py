"""Parquet: rows by row group, and an image's bytes out of the group that holds it."""

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle.data.bad_samples import BadSampleError
from dalle.data.sources.captions import IMAGE_NAMES, check_names, choose_columns, find_name, listed
from dalle.data.sources.index import Writer
from dalle.data.sources.rows import Row
from dalle.types import BadSample

LARGE_GROUP = 64 * 2**20
"""Bytes of a row group above which reading single images is slow enough to say so."""


def parquet_rows(file: Path, image: str | None, caption: str | None, writer: Writer) -> Iterator[Row]:
    """The rows of a Parquet file, a row group at a time; images are not read."""
    try:
        table = _open(file)
    except (OSError, ValueError) as error:
        writer.skipped.append(BadSample(None, file.name, "unreadable shard", str(error)))
        writer.keep &= not isinstance(error, OSError)
        return
    names = table.schema_arrow.names
    check_names(names, str(file))
    column, captions = choose_columns(names, image, caption, str(file))
    kind = table.schema_arrow.field(column).type
    kind = kind.value_type if hasattr(kind, "index_type") else kind  # of what pandas calls a category
    paths = str(kind) in ("string", "large_string", "string_view")
    wanted, count = list(dict.fromkeys([*captions, *([column] if paths else [])])), 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        try:
            for row, value in enumerate(_values(table, group, wanted)):
                texts = listed([value[name] for name in captions])
                if not paths:
                    yield Row(f"{file.name}/{count + row}", None, texts, group, row)
                elif value[column]:
                    yield Row(value[column].replace("\\", "/"), value[column], texts)
                else:
                    skip = BadSample(
                        None, f"{file.name}/{count + row}", "missing twin", "a row without an image"
                    )
                    writer.skipped.append(skip)
        except (OSError, ValueError) as error:
            writer.skipped.append(
                BadSample(None, f"{file.name}, row group {group}", "unreadable shard", str(error))
            )
        count += rows
    if not paths:
        _note_large_groups(table, column, file)


def embedded_image(file: Path, group: int, row: int, image: str | None, name: str) -> bytes:
    """The bytes in a row of a row group; BadSampleError where there are none."""
    try:
        value = _images(os.getpid(), file, group, image)[row].as_py()
    except (OSError, ValueError, IndexError) as error:
        raise BadSampleError(name, "unreadable shard", f"{file}: {error}") from None
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(value, bytes):
        raise BadSampleError(name, "missing twin", "a row without the bytes of an image")
    return value


def _values(table: Any, group: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in table.read_row_group(group, columns, use_threads=False).to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


@lru_cache(maxsize=2)
def _images(process: int, file: Path, group: int, image: str | None) -> Any:
    """The column of images of one row group; each process has its own."""
    table = _opened(process, file)
    column = image or find_name(table.schema_arrow.names, IMAGE_NAMES)
    return table.read_row_group(group, [column], use_threads=False).column(0)


@lru_cache(maxsize=16)
def _opened(process: int, file: Path) -> Any:
    return _open(file)


def _open(file: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError('Parquet needs pyarrow: pip install "zeroshot-text2image[data]"') from None
    return ParquetFile(file)


def _note_large_groups(table: Any, column: str, file: Path) -> None:
    groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > LARGE_GROUP:
        tqdm.write(
            f"note: {file} keeps {largest / 2**20:.0f} MiB in a row group, and one image costs reading all of it; "
            "write it with row groups of about 100 rows, or as tars"
        )
