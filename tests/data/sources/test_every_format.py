"""Every format of data: equal samples, bad samples, exact resume with any number of workers."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.data import BatchReader, DataConfig, ImageTextLoader, open_dataset, open_source, sample_captions
from tests.helpers.formats import COUNT, FORMS, IDS, caption, image, level, names, skipped

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
    splits = [open_dataset(config, split) for split in ("train", "held_out")]
    parts = [{split.name(i) for i in range(split.size)} for split in splits]
    assert len(parts[0] | parts[1]) == splits[0].size + splits[1].size == COUNT
    assert splits[0].hash != splits[1].hash
    assert splits[0].load([(0, 0)], "dvae", seed=1).pixels.shape == (1, 3, 16, 16)


# Bad samples: a function writes GOOD good ones and some bad ones.


def embedded_rows() -> list[dict]:
    data = [*(image(20 * i) for i in range(GOOD)), image(1)[:50], b"<html>404</html>", None, image(1)]
    images = [item and {"bytes": item, "path": None} for item in data]
    captions = [*(f"an image with the number {i}" for i in range(GOOD + 3)), None]
    return [{"image": item, "caption": text} for item, text in zip(images, captions, strict=True)]


EMBEDDED = {8: "truncated", 9: "wrong type", 10: "missing twin", 11: "empty caption"}


def bad_parquet(place: Path) -> tuple[Path, dict[str, str]]:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    place.mkdir()
    parquet.write_table(pa.Table.from_pylist(embedded_rows()), place / "a.parquet", row_group_size=5)
    (place / "b.parquet").write_bytes(b"PAR1 nothing")
    causes = {f"a.parquet/{i}": cause for i, cause in EMBEDDED.items()}
    return place, causes | {"b.parquet": "unreadable shard"}


def bad_hub(place: Path) -> tuple[Path, dict[str, str]]:
    datasets = pytest.importorskip("datasets")
    rows = embedded_rows()
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(place))
    return place, {f"row {i}": cause for i, cause in EMBEDDED.items()}


@pytest.mark.parametrize("form", [bad_parquet, bad_hub])
def test_bad_embedded_images_are_named(form, tmp_path):
    path, expected = form(tmp_path / "set")
    report = check_data(CheckDataArgs(DataConfig(str(path), workers=0), tmp_path / "out"))
    assert {named["name"]: named["cause"] for named in report["bad"]["named"]} == expected
    assert (report["usable"], report["captions"]) == (GOOD, GOOD)


@dataclass(frozen=True)
class Seen:
    """What is compared of a batch."""

    def __call__(self, batch, step):
        sums = torch.from_numpy(batch.pixels).sum((1, 2, 3)).tolist()
        return list(batch.samples), sums, sample_captions(batch, 5)


@pytest.mark.parametrize(("form", "columns"), FORMS, ids=IDS)
def test_every_format_resumes_exactly_with_any_number_of_workers(tmp_path, form, columns):
    path = str(form(tmp_path))
    pairs = open_dataset(DataConfig(path, resolution=16, caption_column=columns, val_path=path))

    def stream(workers: int, first: int, steps: int) -> list:
        with ImageTextLoader(BatchReader(pairs, 4, 7, "dvae", Seen()), steps, workers) as batches:
            return [batches(step) for step in range(first, steps)]

    steps = 2 * COUNT // 4  # two epochs
    whole = stream(0, 0, steps)
    assert stream(2, 0, 2) + stream(1, 2, steps) == whole
    for epoch in range(2):
        seen = [sample for samples, *_ in whole for sample in samples if sample[0] == epoch]
        assert sorted(index for _, index in seen) == list(range(COUNT))


def test_a_training_ends_above_the_fraction_of_bad_samples(tiny_configs, tmp_path, script):
    (tmp_path / "set").mkdir()
    for i in range(160):  # 130 are truncated
        data = image(i, size=(40, 40))
        (tmp_path / "set" / f"{i:03}.png").write_bytes(data if i % 16 < 3 else data[:50])
        (tmp_path / "set" / f"{i:03}.txt").write_text(f"an image with the number {i}")
    words = ["--config", tiny_configs / "dvae" / "shapes.yaml", "--data.path", "set", "--data.workers", "0"]
    words += ["--train.batch-size", "40", "--eval-samples", "2", "--steps", "4"]
    stopped = script("train_dvae", *words, "--out", "stopped")
    assert stopped.code == 1
    [message] = [line for line in stopped.err.splitlines() if line.startswith("error:")]
    assert "truncated; each is named in stopped/bad_samples.jsonl" in message
    bad, tried = map(int, re.match(r"error: (\d+) of (\d+) samples .*more than 1\.0%", message).groups())
    assert 100 < bad < tried <= 160  # of those requested and those read in their place, some are good
    assert len((tmp_path / "stopped" / "bad_samples.jsonl").read_text().splitlines()) > 100
    done = script("train_dvae", *words, "--data.max-bad-fraction", "0.9", "--out", "done")
    assert done.code == 0, done.err
    assert (tmp_path / "done" / "checkpoints" / "latest").read_text().strip() == "step-00000004"
