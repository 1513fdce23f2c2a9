"""Every format of data: equal samples, bad samples, exact resume with any number of workers."""

import csv
import json
import pickle
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.data import BatchReader, DataConfig, ImageTextLoader, open_dataset, open_source
from dalle.data.bad_samples import BadSampleError
from tests.data.test_dataloader import Sums
from tests.data.test_image_decode import png_with_header
from tests.helpers.formats import (
    COUNT,
    FORMS,
    IDS,
    caption,
    hub,
    image,
    level,
    names,
    skipped,
    write_files,
    write_parquet,
    write_tar,
)

GOOD = 8


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_format_gives_the_same_samples(tmp_path, form, columns):
    path = form(tmp_path)
    source, again = (open_source(path, caption_column=columns) for _ in range(2))
    assert source.hash == again.hash
    assert (len(source), skipped(source)) == (COUNT, [])
    source.read(1)
    copy = pickle.loads(pickle.dumps(source))
    for i in (3, 0, 11, 7):
        sample = source.read(i)
        assert sample == copy.read(i)
        assert sample.captions == source.captions(i) == caption(i)
        assert abs(int(level(sample.image)) - i) <= 1  # WebP is lossy
        assert sample.name == source.name(i)
    assert len(set(names(source))) == COUNT
    assert source.shares().dtype == np.uint32
    config = DataConfig(str(path), resolution=16, val_fraction=0.4, caption_column=columns)
    splits = [open_dataset(config, split) for split in ("train", "val")]
    parts = [{split.name(i) for i in range(split.size)} for split in splits]
    assert len(parts[0] | parts[1]) == splits[0].size + splits[1].size == COUNT
    assert splits[0].hash != splits[1].hash
    assert splits[0].load([(0, 0)], "dvae", seed=1).pixels.shape == (1, 3, 16, 16)


# Bad samples: a function writes GOOD good ones and some bad ones.


def embedded_columns() -> dict[str, list]:
    data = [*(image(20 * i) for i in range(GOOD)), image(1)[:50], b"<html>404</html>", None, image(1)]
    images = [item and {"bytes": item, "path": None} for item in data]
    captions = [*(f"an image with the number {i}" for i in range(GOOD + 3)), None]
    return {"image": images, "caption": captions}


EMBEDDED = {8: "truncated", 9: "wrong type", 10: "missing twin", 11: "empty caption"}


def bad_parquet(place: Path) -> tuple[Path, dict[str, str]]:
    place.mkdir()
    write_parquet(place / "a.parquet", embedded_columns())
    (place / "b.parquet").write_bytes(b"PAR1 nothing")
    causes = {f"a.parquet/{i}": cause for i, cause in EMBEDDED.items()}
    return place, causes | {"b.parquet": "unreadable shard"}


def bad_hub(place: Path) -> tuple[Path, dict[str, str]]:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(embedded_columns(), features).save_to_disk(str(place))
    return place, {f"row {i}": cause for i, cause in EMBEDDED.items()}


@pytest.mark.parametrize("form", [bad_parquet, bad_hub])
def test_bad_embedded_images_are_named(form, tmp_path):
    path, expected = form(tmp_path / "set")
    report = check_data(CheckDataArgs(DataConfig(str(path), workers=0), tmp_path / "out"))
    assert {named["name"]: named["cause"] for named in report["bad"]["named"]} == expected
    assert (report["usable"], report["captions"]) == (GOOD, GOOD)


DEFECTS = [
    *((image(1), "one", None), (image(2, form="GIF"), "two", None), (image(3)[:50], "w", "truncated")),
    *((b"", "w", "truncated"), (b"<html>", "w", "wrong type"), (image(4, form="EPS"), "w", "wrong type")),
    *((png_with_header(17_000, 10_000), "w", "decompression bomb"), (b"\xff\xd8", "w", "unreadable image")),
    *((image(5 + i), text, "empty caption") for i, text in enumerate((" ", "nan", "\u200b"))),
    *((image(8), "caf\udce9", "caption not UTF-8"), (image(9), 'a "b"', None), (image(10), 'a, "b', None)),
]
"""Image, caption, cause."""


def defects(place: Path, form: str) -> Path:
    """DEFECTS in one of the formats."""
    images, texts, _ = map(list, zip(*DEFECTS, strict=True))
    paths = [f"{i:02}.jpg" for i in range(len(DEFECTS))]
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    members = [*zip(paths, images, strict=True)]
    sidecars = [(path[:2] + ".txt", text) for path, text in zip(paths, encoded, strict=True)]
    if form == "tar":
        return write_tar(place / "a.tar", members + sidecars)
    if form == "parquet":
        return write_parquet(place / "a.parquet", {"image": images, "caption": encoded})
    if form == "hub":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": data, "path": None} for data in images], "caption": encoded}
        datasets.Dataset.from_dict(rows).save_to_disk(str(place / "set"))
        return place / "set"
    write_files(place, dict(members))
    if form == "folder":
        return write_files(place, dict(sidecars))
    mark = {"csv": ",", "tsv": "\t"}.get(form)
    rows = [["image", "caption"], *zip(paths, texts, strict=True)]
    lines = [json.dumps(dict(zip(*rows[:1], row, strict=True))) for row in rows[1:]]
    with (place / f"a.{form}").open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, delimiter=mark).writerows(rows) if mark else file.write("\n".join(lines))
    return place / f"a.{form}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["folder", "csv", "tsv", "jsonl", "parquet", "tar", "hub"])
def test_every_format_counts_the_same_defects(tmp_path, form):
    path = defects(tmp_path, form)
    report = check_data(CheckDataArgs(DataConfig(str(path), workers=0), tmp_path / "out", sheet=0))
    causes = Counter(cause for _, _, cause in DEFECTS if cause)
    assert (report["usable"], report["bad"]["causes"]) == (len(DEFECTS) - causes.total(), causes)


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_format_resumes_exactly_with_any_number_of_workers(tmp_path, form, columns):
    path = str(form(tmp_path))
    pairs = open_dataset(DataConfig(path, resolution=16, caption_column=columns, val_path=path))

    def stream(workers: int, first: int, steps: int) -> list:
        with ImageTextLoader(BatchReader(pairs, 4, 7, "dvae", Sums()), steps, workers) as batches:
            return [batches(step) for step in range(first, steps)]

    steps = 2 * COUNT // 4  # two epochs
    whole = stream(0, 0, steps)
    assert stream(2, 0, 2) + stream(1, 2, steps) == whole
    for epoch in range(2):
        seen = [sample for _, samples, *_ in whole for sample in samples if sample[0] == epoch]
        assert sorted(index for _, index in seen) == list(range(COUNT))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_damaged_folder_of_datasets_is_refused_by_name(tmp_path, name):
    path = hub(tmp_path)
    (path / name).write_text('{"features": {"image": {"_type": 1}}}')
    with pytest.raises(ValueError, match=r"set cannot be read as a Hugging Face dataset"):
        open_source(path)


def test_offsets_out_of_an_arrow_file_cost_their_row(tmp_path):
    source = open_source(hub(tmp_path))
    source._texts = [Mock(**{"validate.side_effect": ValueError("binary offsets (50) larger than array")})]
    with pytest.raises(BadSampleError, match="row 0: unreadable shard"):
        source.read(0)
