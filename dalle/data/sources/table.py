"""Tables: CSV, TSV, JSONL and Parquet with a column of images and one or more of captions.

Images are paths, relative to the table or to a folder that is given; in Parquet also the bytes themselves.
Rows are read once into an index of [path, captions], so that memory holds none of them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle.data.sources.captions import check_utf8
from dalle.data.sources.image_folder import read_listed
from dalle.data.sources.index import Writer, progress, take_index
from dalle.data.sources.names import share
from dalle.data.sources.parquet import embedded_image, parquet_rows
from dalle.data.sources.rows import text_rows
from dalle.types import RawSample

ROW = np.dtype(
    [("share", "<u4"), ("at", "<u8"), ("size", "<u4"), ("file", "<u4"), ("group", "<u4"), ("row", "<u4")]
)


class TableSource:
    """The rows of one or more tables of a kind, in their order.

    Args:
        files: tables with the same columns.
        image_column: by name; found among the usual ones unless given.
        caption_column: by name, several with commas between; found among the usual ones unless given.
        images: where relative paths start; the folder of the first table unless given.
        cache: where the index lies; see `take_index`.

    Raises:
        ValueError: columns that are not there, or no row.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_column: str | None = None,
        caption_column: str | None = None,
        images: Path | None = None,
        cache: Path | None = None,
    ):
        self.files, self._root = list(files), (images or files[0].parent).resolve()
        self.image_column, self.caption_column = image_column, caption_column
        kind = f"table {image_column} {caption_column}"
        self._index = take_index(files, kind, ROW, self._build, cache)
        self.hash, self.skipped = self._index.hash, self._index.skipped
        if not len(self):
            said = "; ".join(f"{skip.name}: {skip.cause}, {skip.detail}" for skip in self.skipped[:3])
            raise ValueError(f"{files[0]} holds no row with an image" + f" ({said})" * bool(said))

    def _build(self, writer: Writer, files: Sequence[Path]) -> dict:
        for number, file in enumerate(progress(files, "tables")):
            rows = parquet_rows if file.suffix.lower() == ".parquet" else text_rows
            records: list[tuple] = []
            for row in rows(file, self.image_column, self.caption_column, writer):
                place = writer.put_text(json.dumps([row.name, row.image, row.captions]).encode())
                records.append((share(row.name), *place, number, row.group, row.row))
                if len(records) == 65536:
                    writer.put(np.array(records, ROW))
                    records.clear()
            writer.put(np.array(records, ROW))
        return {}

    def __len__(self) -> int:
        return len(self._index.samples)

    def _row(self, index: int) -> tuple[str, str | None, list[str]]:
        record = self._index.samples[index]
        return json.loads(self._index.text(record["at"], record["size"]))

    def name(self, index: int) -> str:
        """The path of the image, else file and row."""
        return self._row(index)[0]

    def shares(self) -> np.ndarray:
        """uint32 (N,), a hash of each name; rows of the same image have the same."""
        return self._index.samples["share"]

    def read(self, index: int) -> RawSample:
        """Unusable, naming the sample and the cause, for one that cannot be read."""
        name, image, _ = self._row(index)
        captions = self.captions(index)
        if image is not None:
            return RawSample(name, read_listed(self._root, image), captions)
        record = self._index.samples[index]
        file = self.files[record["file"]]
        data = embedded_image(file, int(record["group"]), int(record["row"]), self.image_column, name)
        return RawSample(name, data, captions)

    def captions(self, index: int) -> list[str]:
        """Those of `read`, without reading the image."""
        name, _, captions = self._row(index)
        return check_utf8(captions, name)
