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
    with tarfile.open(path, "w", **options) as tar:
        for name, data, *fields in members:
            add(tar, name, data, **(fields[0] if fields else {}))
    return path


def pair(key: str, i: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", image(i)), (f"{key}.txt", "\n".join(caption(i)).encode())]


def folder(place: Path) -> Path:
    for i in range(COUNT):
        (place / f"p{i:03}.png").write_bytes(image(i))
        (place / f"p{i:03}.txt").write_text("\n".join(caption(i)), encoding="utf-8")
    return place


def folder_json(place: Path) -> Path:
    for i in range(COUNT):
        (place / f"p{i:03}.png").write_bytes(image(i))
        (place / f"p{i:03}.json").write_text(json.dumps({"captions": caption(i), "licence": "CC0"}))
    return place


def images(place: Path) -> Path:
    (place / "images").mkdir()
    for i in range(COUNT):
        (place / "images" / f"p{i:03}.png").write_bytes(image(i))
    return place


def csv_file(place: Path) -> Path:
    rows = ["\ufeffimage,caption,second"]  # as Excel writes it
    for i in range(COUNT):
        rows.append(f'images/p{i:03}.png,"{caption(i)[0]}",{caption(i)[1] if i % 3 == 0 else ""}')
    (images(place) / "pairs.csv").write_text("\r\n".join(rows) + "\r\n", encoding="utf-8")
    return place / "pairs.csv"


def tsv_file(place: Path) -> Path:
    rows = ["file_name\ttext\tsecond"]
    for i in range(COUNT):
        rows.append(f"images/p{i:03}.png\t{caption(i)[0]}\t{caption(i)[1] if i % 3 == 0 else ''}")
    (images(place) / "pairs.tsv").write_text("\n".join(rows), encoding="utf-8")
    return place / "pairs.tsv"


def jsonl_file(place: Path) -> Path:
    rows = [json.dumps({"file_name": f"images/p{i:03}.png", "text": caption(i)}) for i in range(COUNT)]
    (images(place) / "pairs.jsonl").write_text("\n".join(rows))
    return place / "pairs.jsonl"


def parquet_bytes(place: Path) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "image": [{"bytes": image(i), "path": None} for i in range(COUNT)],
            "caption": [caption(i) for i in range(COUNT)],
        }
    )
    parquet.write_table(table, place / "pairs.parquet", row_group_size=5)
    return place / "pairs.parquet"


def parquet_paths(place: Path) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "path": [f"images/p{i:03}.png" for i in range(COUNT)],
            "TEXT": [caption(i)[0] for i in range(COUNT)],
            "second": [caption(i)[1] if i % 3 == 0 else None for i in range(COUNT)],
        }
    )
    parquet.write_table(table, images(place) / "pairs.parquet", row_group_size=5)
    return place / "pairs.parquet"


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
    rows = {
        "image": [{"bytes": image(i), "path": None} for i in range(COUNT)],
        "caption": [caption(i) for i in range(COUNT)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(place / "set"))
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
