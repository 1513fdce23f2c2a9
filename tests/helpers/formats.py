"""The same twelve captioned images in every format that --data.path opens; shared by the tests of data."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COUNT = 12


def image(level: int, size=(24, 20), form="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(buffer, form)
    return buffer.getvalue()


def level(data: bytes) -> int:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[0, 0, 0]


def write_files(place: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return place


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def all_captions(source) -> list[list[str]]:
    return [source.captions(i) for i in range(len(source))]


def skipped(source) -> list[tuple[str, str]]:
    return [(bad.name, bad.cause) for bad in source.skipped]


def caption(i: int) -> list[str]:
    return [f"cat {i}", f"größe {i}"] if i % 3 == 0 else [f"cat {i}"]


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: list[tuple], **options) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data, *fields in members:
            add(tar, name, data, **(fields[0] if fields else {}))
    return path


def pair(key: str, i: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image(i)), (f"{key}.txt", "\n".join(caption(i)).encode())]


def images(prefix: str = "") -> dict[str, bytes]:
    return {f"{prefix}p{i:03}.png": image(i) for i in range(COUNT)}


def folder(place: Path) -> Path:
    return write_files(place, dict(member for i in range(COUNT) for member in pair(f"p{i:03}", i)))


def folder_json(place: Path) -> Path:
    texts = {f"p{i:03}.json": json.dumps({"captions": caption(i), "licence": "CC0"}) for i in range(COUNT)}
    return write_files(place, images() | texts)


def write_table(path: Path, text: str) -> Path:
    """A table next to the folder images/ of the images it names."""
    return write_files(path.parent, images("images/") | {path.name: text}) / path.name


def row(i: int, separator: str, quote: str = "") -> str:
    first, second = (*caption(i), "")[:2]
    return separator.join([f"images/p{i:03}.png", quote + first + quote, second])


def csv_file(place: Path) -> Path:
    rows = ["\ufeffimage,caption,second", *(row(i, ",", '"') for i in range(COUNT))]  # as Excel writes it
    return write_table(place / "pairs.csv", "\r\n".join(rows) + "\r\n")


def tsv_file(place: Path) -> Path:
    rows = ["file_name\ttext\tsecond", *(row(i, "\t") for i in range(COUNT))]
    return write_table(place / "pairs.tsv", "\n".join(rows))


def jsonl_file(place: Path) -> Path:
    rows = [json.dumps({"file_name": f"images/p{i:03}.png", "text": caption(i)}) for i in range(COUNT)]
    return write_table(place / "pairs.jsonl", "\n".join(rows))


def columns() -> dict[str, list]:
    images = [{"bytes": image(i), "path": None} for i in range(COUNT)]
    return {"image": images, "caption": [caption(i) for i in range(COUNT)]}


def write_parquet(path: Path, columns: list | dict, names: list[str] | None = None) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns, names), path, row_group_size=5)
    return path


def parquet_bytes(place: Path) -> Path:
    return write_parquet(place / "pairs.parquet", columns())


def parquet_paths(place: Path) -> Path:
    rows = [(f"images/p{i:03}.png", *caption(i), None)[:3] for i in range(COUNT)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return write_parquet(write_table(place / "pairs.parquet", ""), columns, ["path", "TEXT", "second"])


def one_tar(place: Path) -> Path:
    return write_tar(place / "all.tar", [member for i in range(COUNT) for member in pair(f"{i:06}", i)])


def tars(place: Path) -> Path:
    for shard in range(3):
        numbers = range(shard * COUNT // 3, (shard + 1) * COUNT // 3)
        write_tar(place / f"set-{shard:03}.tar", [member for i in numbers for member in pair(f"{i:06}", i)])
    return place


def tars_json(place: Path) -> Path:
    members = [(f"{i:03}.webp", image(i, form="WEBP")) for i in range(COUNT)]  # captions lie apart
    members += [(f"{i:03}.json", json.dumps({"caption": caption(i)}).encode()) for i in range(COUNT)]
    return write_tar(place / "all.tar", members)


def hub(place: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    captions = datasets.Sequence(datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(), "caption": captions})
    datasets.Dataset.from_dict(columns(), features).save_to_disk(str(place / "set"))
    return place / "set"


FORMS = [
    (folder, None),
    (folder_json, None),
    (csv_file, "caption,second"),
    (tsv_file, "text,second"),
    (jsonl_file, None),
    (parquet_bytes, None),
    (parquet_paths, "TEXT,second"),
    (one_tar, None),
    (tars, None),
    (tars_json, None),
    (hub, None),
]
IDS = [form.__name__ for form, _ in FORMS]
