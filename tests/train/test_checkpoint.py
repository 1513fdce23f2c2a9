"""Checkpoints: crashes while writing, damaged files, which are kept, and loading models from them."""

import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dalle.commands.train_dvae import train_dvae
from dalle.config import cli_errors
from dalle.hub.registry import load_model
from dalle.io.files import CHECKSUMS, write_checksums
from dalle.pipelines.dalle import DALLE
from dalle.pretrained.inspect import describe_checkpoint
from dalle.runs.inputs import is_complete
from dalle.train import checkpoint
from dalle.train.checkpoint import latest_checkpoint, restore
from dalle.train.config import NO_PLATEAU
from dalle.train.state import bias_corrected
from tests.helpers.checkpoints import flip
from tests.helpers.line import CONFIG, checkpoint_names, fit_line, fresh_state, newest_files

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "meta.json")


OWNERS = {"write_tensors": checkpoint, "replace": os, "fsync": os, "rmtree": shutil}


@pytest.fixture
def crash(monkeypatch):
    """crash(where, n): that function's n-th call from now on leaves half its work and raises; lists calls."""

    def arm(where: str, n: float = math.inf) -> list[tuple]:
        original, calls = getattr(OWNERS[where], where), []

        def failing(*args, **kwargs):
            calls.append(args)
            if len(calls) < n:
                return original(*args, **kwargs)
            if where == "write_tensors":
                Path(args[0]).write_bytes(b"half a file")
            raise OSError("no space left on device")

        monkeypatch.setattr(OWNERS[where], where, failing)
        return calls

    return arm


# One checkpoint: three tensor files; renames of meta.json, SHA256SUMS, the folder and the pointer; a sync of
# each file and of the folders; removals of a folder of the same name and of the oldest one. The log is
# renamed before.
CRASHES = [("write_tensors", n) for n in (1, 2, 3)] + [("replace", n) for n in (2, 3, 4, 5)]
CRASHES += [("fsync", n) for n in range(2, 10)] + [("rmtree", n) for n in (1, 2)]


@pytest.mark.parametrize(("where", "n"), CRASHES)
def test_a_crash_at_any_write_leaves_a_whole_checkpoint(where, n, crash, tmp_path, monkeypatch):
    fit_line(tmp_path / "whole", steps=5)
    fit_line(tmp_path / "run", steps=3)
    crash(where, n)
    with pytest.raises(OSError, match="no space left"):
        fit_line(tmp_path / "run", steps=4)
    monkeypatch.undo()
    found = fresh_state()
    restore(latest_checkpoint(tmp_path / "run"), found)
    assert found.step == (4 if (where, n) == ("rmtree", 2) else 3)
    fit_line(tmp_path / "run", steps=5)
    assert newest_files(tmp_path / "run") == newest_files(tmp_path / "whole")
    assert checkpoint_names(tmp_path / "run") == ["latest", "step-00000004", "step-00000005"]


def test_there_are_no_writes_that_the_crashes_above_miss(crash, tmp_path):
    calls = {where: crash(where) for where in ("write_tensors", "replace", "fsync")}
    fit_line(tmp_path, steps=1)
    for name, of_the_log in (("write_tensors", 0), ("replace", 1), ("fsync", 1)):
        assert len(calls[name]) - of_the_log == sum(where == name for where, _ in CRASHES)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(file, harm, tmp_path, capsys):
    fit_line(tmp_path / "whole", steps=4)
    fit_line(tmp_path / "run", steps=3)
    harm(latest_checkpoint(tmp_path / "run") / file)
    fit_line(tmp_path / "run", steps=4)
    printed = capsys.readouterr().out
    for words in (f"step-00000003/{file}", "warning: ", "taking step-00000002", "resuming from step 2"):
        assert words in printed
    assert newest_files(tmp_path / "run") == newest_files(tmp_path / "whole")


def test_without_a_whole_checkpoint_a_run_is_refused_and_each_damage_named(tmp_path):
    fit_line(tmp_path, steps=2)
    flip(tmp_path / "checkpoints" / "step-00000001" / "ema.safetensors")
    (tmp_path / "checkpoints" / "step-00000002" / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"no checkpoint .*2/SHA256SUMS .*1/ema.*another --out"):
        fit_line(tmp_path, steps=3)


def test_a_pointer_that_is_lost_or_names_nothing_costs_no_checkpoint(tmp_path, capsys):
    fit_line(tmp_path, steps=3)
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\0")
    fit_line(tmp_path, steps=4)
    assert "resuming from step 3" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    assert latest_checkpoint(tmp_path).name == "step-00000003"
    fit_line(tmp_path, steps=5)
    assert "resuming from step 3" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["latest", "step-00000002"])
def test_what_is_in_the_way_of_a_checkpoint_is_named_in_one_sentence(name, tmp_path):
    fit_line(tmp_path, steps=1)
    path = tmp_path / "checkpoints" / name
    if path.is_file():
        path.unlink()
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(SystemExit, match=rf"error: .*step 2 \(.*{name}\); .* is intact"), cli_errors():
        fit_line(tmp_path, steps=2)


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda folder: (folder / "meta.json").write_text("[]")])
def test_every_reader_takes_the_checkpoint_before(harm, tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/dvae")
    args = replace(tiny_runs.dvae, out=run, train=replace(tiny_runs.dvae.train, save_every=1))
    train_dvae(args)
    harm(latest_checkpoint(run))
    assert load_model(run, "dvae").source == run / "checkpoints" / "step-00000001"
    assert describe_checkpoint(run)["step"] == "1 of 2"
    assert not is_complete("dvae")
    train_dvae(args)
    assert "resuming from step 1 of 2" in capsys.readouterr().out


def test_sums_are_what_sha256sum_reads(tmp_path):
    fit_line(tmp_path, steps=1)
    folder = latest_checkpoint(tmp_path)
    names = [line.split("  ")[1] for line in (folder / CHECKSUMS).read_text().splitlines()]
    assert names == sorted(FILES)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", CHECKSUMS], cwd=folder, check=True)


@pytest.mark.parametrize(
    ("steps", "keep", "every", "kept"),
    [(5, 1, None, [5]), (5, 10, None, [1, 2, 3, 4, 5]), (9, 2, 3, [3, 6, 8, 9])],
)
def test_the_newest_and_every_mth_are_kept(steps, keep, every, kept, tmp_path):
    fit_line(tmp_path, steps=steps, keep_last=keep, keep_every=every)
    assert checkpoint_names(tmp_path) == ["latest", *(f"step-0000000{step}" for step in kept)]
    assert latest_checkpoint(tmp_path).name == f"step-0000000{steps}"


def test_a_folder_that_a_crash_left_ahead_never_pushes_out_the_newest(tmp_path):
    """Killed between the folder's rename and the pointer's, then resumed from a smaller step."""
    fit_line(tmp_path, steps=3, keep_last=1)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000009")
    fit_line(tmp_path, steps=4, keep_last=1)
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_resuming_names_step_checkpoint_and_date(tmp_path, capsys):
    fit_line(tmp_path, steps=2)
    assert "resuming" not in capsys.readouterr().out
    os.utime(latest_checkpoint(tmp_path) / "meta.json", (0, time.mktime((2021, 2, 24, 12, 30, 5, 0, 0, -1))))
    fit_line(tmp_path, steps=3)
    place = tmp_path / "checkpoints" / "step-00000002"
    expected = f"line: resuming from step 2 of 3 ({place}, saved 2021-02-24 12:30:05)"
    assert capsys.readouterr().out.splitlines()[0] == expected


def test_a_part_that_is_new_to_a_run_starts_afresh_and_is_kept_from_then_on(tmp_path):
    fit_line(tmp_path, steps=1, optimizer=replace(CONFIG.optimizer, plateau=NO_PLATEAU))
    assert [fit_line(tmp_path, steps).extras["plateau"].count for steps in (2, 4)] == [1, 3]


def test_a_checkpoint_describes_itself(chain):
    meta = json.loads((latest_checkpoint(chain / "transformer") / "meta.json").read_text())
    names = "format kind model_config config inputs versions steps step ema extras"
    assert meta.keys() == set(names.split())
    assert meta["kind"] == "transformer"
    assert meta["model_config"]["depth"] == 2
    assert meta["config"]["train"]["batch_size"] == 4
    assert meta["inputs"]["dvae"] == load_model(chain / "dvae", "dvae").hash
    assert meta["inputs"]["text"]["merges"]


@pytest.fixture
def broken(chain, tmp_path) -> Path:
    """A copy of a dVAE's checkpoint."""
    shutil.copytree(chain / "dvae", tmp_path / "dvae")
    return latest_checkpoint(tmp_path / "dvae")


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("length", [0, 4, -1])
def test_a_truncated_or_missing_file_is_named(broken, file, length):
    (broken / file).write_bytes((broken / file).read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{file} is truncated or changed"):
        load_model(broken, "dvae")
    write_checksums(broken)
    with pytest.raises(ValueError, match=rf"{file} is (empty|truncated or not a safetensors file)"):
        load_model(broken, "dvae")
    (broken / file).unlink()
    with pytest.raises(ValueError, match=file):
        load_model(broken, "dvae")


def test_missing_moments_are_named_on_resuming(broken, tiny_runs):
    run = replace(tiny_runs.dvae, out=broken.parents[1], steps=3)
    (broken / "optimizer.safetensors").unlink()
    write_checksums(broken)
    with pytest.raises(ValueError, match=r"no file .*optimizer\.safetensors"):
        train_dvae(run)


NAME = "encoder.blocks.input.b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ("{half", r"meta\.json is not JSON"),
        ("[]", "damaged"),
        ('{"kind": "dvae"}', "format None"),
        ('{"kind": "clip"}', "'clip', expected 'dvae'"),
        ({NAME: torch.zeros(5)}, rf"'{NAME}' is \(5,\), the model's is \(4,\)"),
        ({NAME: None}, f"lacks 1 tensors of the model, first '{NAME}'"),
        ({"extra": torch.zeros(1)}, "holds 1 tensors the model lacks, first 'extra'"),
    ],
)
def test_a_bad_description_and_other_tensors_are_refused(broken, changes, words):
    if isinstance(changes, str):
        (broken / "meta.json").write_text(changes)
    else:
        weights = load_file(broken / "model.safetensors") | changes
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save_file(weights, broken / "model.safetensors")
        write_checksums(broken)
    with pytest.raises(ValueError, match=words):
        load_model(broken, "dvae", averaged=False)


def test_an_unknown_key_of_the_configuration_is_named(broken, change_meta):
    change_meta(broken, model_config={"width": 3})
    with pytest.raises(ValueError, match=r"'width'; did you mean 'widths'"):
        load_model(broken, "dvae")


@pytest.mark.parametrize("place", ["nowhere", "dvae/log.jsonl"])
def test_a_path_that_holds_no_run_is_refused(broken, place):
    with pytest.raises(ValueError, match="expected a run or model directory"):
        load_model(broken.parents[2] / place, "dvae")


def test_a_run_a_checkpoint_and_a_model_directory_hold_the_same(chain):
    paths = [chain / "dvae", latest_checkpoint(chain / "dvae"), chain / "model"]
    assert len({load_model(path, "dvae").hash for path in paths}) == 1


def test_the_averaged_weights_are_taken_unless_the_raw_are_asked_for(tiny_runs, tmp_path):
    train_dvae(replace(tiny_runs.dvae, out=tmp_path, steps=4))
    folder = latest_checkpoint(tmp_path)
    meta = json.loads((folder / "meta.json").read_text())["ema"]
    averages = bias_corrected(load_file(folder / "ema.safetensors"), meta["decay"], meta["updates"])
    raw = load_file(folder / "model.safetensors")
    for averaged, expected, other in ((True, averages, raw), (False, raw, averages)):
        model = load_model(tmp_path, "dvae", averaged=averaged).model
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert torch.equal(model.state_dict()[NAME], expected[NAME])
        assert not torch.equal(model.state_dict()[NAME], other[NAME])


def test_nothing_is_unpickled(chain, tmp_path, monkeypatch):
    """Neither on loading nor on resuming: a checkpoint cannot run code."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    fit_line(tmp_path, steps=1)
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    for kind in ("dvae", "transformer", "clip"):
        load_model(chain / kind, kind)
    DALLE.from_pretrained(chain / "model")
    assert fit_line(tmp_path, steps=2).step == 2


def test_nothing_is_pickled(chain):
    """Every file is JSON, text, an image, safetensors, or numpy without objects."""
    allowed = {".json", ".jsonl", ".md", ".safetensors", ".png", ".npy", ""}  # "": latest, SHA256SUMS, .lock
    assert {path.suffix for path in chain.rglob("*") if path.is_file()} <= allowed
