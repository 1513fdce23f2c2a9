"""Datasets by index, their splits, crops and bad samples: dalle/data/dataset.py."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dalle.data import DataConfig, first_samples, open_dataset
from dalle.data.dataset import ImageTextDataset
from dalle.data.sources import FolderSource
from tests.helpers.formats import skipped, write_files
from tests.helpers.scenes import scene


def add(folder, name, captions="a caption\n", level=0, size=(24, 20)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    path.with_suffix(".txt").write_text(captions, encoding="utf-8")
    return path


def dataset_of(folder, split="train", resolution=16, val_fraction=1e-9):
    return ImageTextDataset(FolderSource(folder), resolution, split, val_fraction)


def names(folder, split="train", val_fraction=0.3):
    dataset = dataset_of(folder, split, val_fraction=val_fraction)
    return [dataset.name(index) for index in range(dataset.size)]


@pytest.fixture
def folder(tmp_path):
    """Forty images in two folders with the same stems."""
    for i in range(20):
        add(tmp_path, f"cats/{i:02d}.png", f"cat {i}", level=i)
        add(tmp_path, f"dogs/{i:02d}.jpg", f"dog {i}", level=100 + i)
    return tmp_path


def test_pixels_and_captions_are_of_the_same_sample(folder):
    write_files(folder, {"notes.txt": "no image", "list.csv": "no image"})
    dataset = dataset_of(folder)
    assert dataset.size == 40
    batch = dataset.load([(0, 3), (0, 30), (0, 3)])
    assert (batch.pixels.shape, batch.pixels.dtype) == ((3, 3, 16, 16), np.float32)
    for pixels, [caption], (_, index) in zip(batch.pixels, batch.captions, batch.samples, strict=True):
        kind, number = dataset.name(index).split("/")
        assert caption == f"{kind[:-1]} {int(number[:2])}"
        assert pixels == pytest.approx((int(number[:2]) + 100 * (kind == "dogs")) / 255)


def test_splits_partition_the_images_and_grow_with_the_fraction(folder):
    train, val = names(folder), names(folder, "val")
    assert not set(train) & set(val)
    assert len(train) + len(val) == 40
    assert 4 <= len(val) <= 20
    assert set(names(folder, "val", 0.2)) < set(names(folder, "val", 0.5))


def test_an_image_keeps_its_split_whatever_is_beside_it(folder, tmp_path_factory):
    val = names(folder, "val")
    elsewhere = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(folder, elsewhere)
    for i in range(20):
        add(elsewhere, f"birds/{i}.png")
    for name in names(folder)[::2]:
        (elsewhere / name).unlink()
    left = [name for name in val if (elsewhere / name).exists()]
    assert [name for name in names(elsewhere, "val") if not name.startswith("birds")] == left


def test_the_hash_is_of_the_images(folder):
    before = dataset_of(folder).hash
    assert dataset_of(folder).hash == before
    add(folder, "zz.png")
    assert dataset_of(folder).hash != before


@pytest.mark.parametrize(
    ("config", "split", "words"),
    [
        (DataConfig("nowhere"), "train", "nothing at nowhere"),
        (DataConfig("set"), "new_pairs", "unknown split 'new_pairs'"),
        (DataConfig("set", val_fraction=1e-9), "val", "none of 1 samples .*--data.val-fraction"),
        (DataConfig(), "train", r"no data: give --data\.path"),
    ],
)
def test_missing_data_and_splits_are_refused(tmp_path, monkeypatch, config, split, words):
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "set", "a.png")
    with pytest.raises(ValueError, match=words):
        open_dataset(config, split)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        FolderSource(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "settings",
    [{"val_fraction": 0}, {"val_fraction": 1}, {"max_bad_fraction": 2}, {"workers": -2}, {"prefetch": 0}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        DataConfig(**settings)


def test_a_folder_or_the_shapes_are_opened(folder):
    config = DataConfig(str(folder), resolution=16, val_fraction=0.3)
    assert open_dataset(config, "val").size == len(names(folder, "val"))
    shapes = open_dataset(DataConfig("shapes", resolution=32))
    assert shapes.size is None
    assert shapes.load([(0, 5)]).pixels.shape == (1, 3, 32, 32)


def test_many_bad_samples_at_the_opening_are_refused(tmp_path, capsys):
    write_files(tmp_path, {f"{i}.png": "" for i in range(150)})
    with pytest.raises(ValueError, match=r"no image .*with a \.txt .*150 missing twin"):
        dataset_of(tmp_path)
    write_files(tmp_path, {"1.txt": "the only caption"} | {f"{i}.xyz": "" for i in range(200, 400)})
    config = DataConfig(str(tmp_path), val_fraction=1e-9)
    with pytest.raises(ValueError, match=r"149 of 150 samples .*149 missing twin; for example"):
        open_dataset(config)
    dataset = open_dataset(replace(config, max_bad_fraction=1.0))
    assert (dataset.size, len(dataset.skipped)) == (1, 349)
    assert "left out 349: 200 unused file, 149 missing twin; for example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "captions", "bad"),
    [
        ("\ufeffone dog\n\n  two dogs \r\nö\n", ["one dog", "two dogs", "ö"], []),
        ("", [], [("a.png", "empty caption")]),
        (" \n\n", [], [("a.png", "empty caption")]),
        (b"sch\xf6n", [], [("a.txt", "caption not UTF-8")]),
    ],
)
def test_captions_are_the_lines_of_the_file_beside_the_image(tmp_path, text, captions, bad):
    dataset = dataset_of(write_files(add(tmp_path, "a.png").parent, {"a.txt": text}))
    batch = dataset.load([(0, 0)])
    assert (dataset.captions([0]), batch.captions) == ([captions], [captions] if captions else [])
    assert (len(batch.pixels), skipped(batch)) == (len(batch.captions), bad)


def test_bad_images_are_left_out_and_named(tmp_path):
    for name, side in (("a", 40), ("b", 12), ("d", 40)):
        add(tmp_path, f"{name}.png", name, size=(side, side))
    add(tmp_path, "c.png").write_bytes(b"not an image")
    dataset = dataset_of(tmp_path, resolution=32)
    batch = dataset.load([(2, index) for index in range(4)], "dvae")
    assert (batch.samples, batch.captions) == ([(2, 0), (2, 3)], [["a"], ["d"]])
    assert skipped(batch) == [("b.png", "too small"), ("c.png", "wrong type")]
    assert len(dataset.load([(0, 1)]).samples) == 1  # without augmentation it is enlarged
    assert dataset.load([(0, 1)], "transformer").skipped[0].cause == "too small"


def test_a_dataset_without_a_usable_sample_is_refused(tmp_path):
    for i in range(5):
        add(tmp_path, f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no usable sample among 5 tried: 5: 5 truncated; for example"):
        dataset_of(tmp_path).load([(0, 0)], replace=True)
    with pytest.raises(ValueError, match="no usable sample to evaluate on: 5: 5 truncated"):
        first_samples(dataset_of(tmp_path), 2)


def test_first_samples_are_the_first_usable_ones(tmp_path):
    for i in range(8):
        add(tmp_path, f"{i}.png")
    for i in (0, 2):
        (tmp_path / f"{i}.png").write_bytes(b"")
    batch = first_samples(dataset_of(tmp_path), 4)
    assert batch.samples == [(0, 1), (0, 3), (0, 4), (0, 5)]
    assert len(batch.pixels) == len(batch.captions) == 4
    assert len(first_samples(dataset_of(tmp_path), 10).samples) == 6


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_crop_depends_on_seed_epoch_and_index_alone(tmp_path, augment):
    for i in range(3):
        add(tmp_path, f"{i}.png")
        scene(i, (60, 40)).save(tmp_path / f"{i}.png")
    dataset = dataset_of(tmp_path)

    def pixels_of(samples, seed=7):
        return dataset.load(samples, augment, seed).pixels

    pixels = pixels_of([(0, 1), (1, 1), (0, 2), (1, 1)])
    assert (pixels.shape, pixels.dtype) == ((4, 3, 16, 16), np.float32)
    assert (pixels[0] != pixels[1]).any()
    assert (pixels[1] == pixels[3]).all()
    assert (pixels[[2]] == pixels_of([(0, 2)])).all()
    assert (pixels[[2]] != pixels_of([(0, 2)], seed=8)).any()
