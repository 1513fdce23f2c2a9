"""meta.json and config.json: other formats and damaged files are named."""

import pytest
import torch

from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.write_tars import write_tars
from dalle.data.config import DataConfig
from dalle.hub.registry import write_model_directory
from dalle.io.files import (
    FORMAT,
    check_meta,
    load_strict,
    prepare_file,
    read_config,
    read_tensors,
    write_json,
    write_tensors,
)
from dalle.io.torch_file import read_torch_file
from dalle.runs.quickstart import QuickstartArgs, quickstart

EMA = {"decay": 0.9, "updates": 1, "update_every": 1}
META = {"kind": "dvae", "format": FORMAT, "config": {}, "inputs": {}, "ema": EMA, "step": 1}
PART = {"model_config": {"width": 2}, "hash": "00ff"}
CONFIG = {"kind": "dalle", "format": FORMAT, "inputs": {}, "parts": {"dvae": PART}}


BAD_PARTS = [None, [], {}, {"../dvae": PART}, {"x" * 10_000: PART}]
BAD_PARTS += [{"dvae": part} for part in (3, {"hash": "00ff"}, PART | {"hash": None})]
BAD_PARTS += [{"dvae": PART | {"hash": "f" * 10_000}}]


@pytest.mark.parametrize(
    ("meta", "message"),
    [(meta, "unknown") for meta in (None, [], "dvae", 3, META | {"kind": None})]
    + [(META | {"format": number}, f"format {number}") for number in (0, None, True)]
    + [
        (META | {"format": FORMAT + 1}, rf"format {FORMAT + 1}, .* reads {FORMAT}; use the version"),
        (META | {"kind": "clip"}, "'clip', expected 'dvae'"),
        (META | {"inputs": ["text"]}, "inputs .* damaged"),
    ],
)
def test_bad_meta_is_refused(tmp_path, meta, message):
    assert check_meta(META, "dvae", tmp_path) == META
    with pytest.raises(ValueError, match=message):
        check_meta(meta, "dvae", tmp_path)


@pytest.mark.parametrize("parts", BAD_PARTS, ids=lambda parts: str(parts)[:40])
def test_a_damaged_config_is_refused(tmp_path, parts):
    write_json(tmp_path / "config.json", CONFIG)
    assert read_config(tmp_path) == CONFIG
    for damaged in (CONFIG | {"parts": parts}, {name: CONFIG[name] for name in CONFIG if name != "inputs"}):
        write_json(tmp_path / "config.json", damaged)
        with pytest.raises(ValueError, match="damaged"):
            read_config(tmp_path)


def test_weights_have_the_permissions_of_any_new_file(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.zeros(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("read", [read_tensors, read_torch_file])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"\0" * 257 + b"ustar\0", "a tar"),
        (b"\x40\0\0\0\0\0\0\0{", "truncated"),
        (None, "no file"),
    ],
)
def test_another_kind_of_file_than_weights_is_named(tmp_path, read, content, message):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)
    with pytest.raises((ValueError, OSError), match="directory"):
        read(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.model._orig_mod.", "ema_model."])
def test_weights_are_loaded_without_the_prefixes_of_wrappers(prefix):
    model, source = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    load_strict(model, {f"{prefix}{name}": t for name, t in source.state_dict().items()}, "file")
    assert torch.equal(model.weight, source.weight)


@pytest.mark.parametrize(
    "write",
    [
        lambda out: train_tokenizer(TrainTokenizerArgs(out)),
        lambda out: check_data(CheckDataArgs(DataConfig(path=str(out)), out)),
        lambda out: write_tars(None, out),
        lambda out: write_model_directory(out, {}),
        lambda out: quickstart(QuickstartArgs(out)),
    ],
)
@pytest.mark.parametrize("mark", ["spec.json", "checkpoints"])
def test_a_result_of_another_kind_is_never_written_over(tmp_path, write, mark):
    (tmp_path / mark).write_text("a red circle")
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=f"it has a {mark}"):
        write(tmp_path)


@pytest.mark.parametrize("name", ["", "folder", "x" * 300, "file/a.json"])
def test_a_file_that_cannot_be_written_is_reported_before_the_work(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        prepare_file(tmp_path / name)
    prepare_file(tmp_path / "new" / "a.json")
    assert list((tmp_path / "new").iterdir()) == []
