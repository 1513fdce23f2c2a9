"""scripts/inspect_checkpoint.py: descriptions of checkpoints, and refusals in one line."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.dvae import DVAE, DVAEConfig
from dalle.hub.registry import LoadedModel
from tests.helpers.hostile import Call


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(DVAE(DVAEConfig((8, 16), 1, 2, vocab_size=24, codebook_dim=12)).state_dict())


def report_of(path: Path, tensors: dict) -> dict:
    torch.save(tensors, path)
    return inspect_checkpoint(InspectCheckpointArgs(path))


def test_an_external_file(tmp_path: Path, state, script) -> None:
    file = tmp_path / "dvae.pt"
    torch.save(state, file)
    done = script("inspect_checkpoint", file, "--json", tmp_path / "report.json")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    expected = {"family": "OpenAI dVAE", "kind": "image tokenizer", "container": "torch zip", "fits": True}
    assert {name: report[name] for name in expected} == expected
    assert report["sizes"]["widths"] == [8, 16]
    assert report["parameters"] == report["numbers"] == sum(t.numel() for t in state.values())
    assert report["sha256"] == {"dvae.pt": hashlib.sha256(file.read_bytes()).hexdigest()}
    for word in ("OpenAI dVAE", "modified MIT", report["sha256"]["dvae.pt"]):
        assert word in done.out


def test_missing_unexpected_and_wrong_shapes(tmp_path: Path, state) -> None:
    changed = dict(state) | {"encoder.more": torch.zeros(1)}
    del changed["decoder.blocks.input.b"]
    changed["encoder.blocks.input.w"] = changed["encoder.blocks.input.w"][:, :2]
    report = report_of(tmp_path / "dvae.pt", changed)
    assert report["fits"] is False
    assert (report["missing"], report["unexpected"]) == (["decoder.blocks.input.b"], ["encoder.more"])
    assert report["wrong_shape"] == ["encoder.blocks.input.w: (8, 2, 7, 7), not (8, 3, 7, 7)"]


def test_an_unknown_format(tmp_path: Path, script) -> None:
    assert "lonely.weight" in report_of(tmp_path / "x.pt", {"lonely.weight": torch.zeros(2)})["note"]
    assert "no tensors" in report_of(tmp_path / "x.pt", {"epoch": 3})["note"]
    torch.save({"\x1b[31m": torch.zeros(2)}, tmp_path / "x.pt")  # names cannot write on the terminal
    assert "\x1b" not in script("inspect_checkpoint", tmp_path / "x.pt").out


@pytest.mark.parametrize("part", ["dvae", "transformer", "clip"])
def test_a_run_of_this_library(chain: Path, part: str, script) -> None:
    done = script("inspect_checkpoint", chain / part)
    assert done.code == 0, done.err
    for word in (f"{part} of this library", "fits         yes", "step         2 of 2", "sha256"):
        assert word in done.out


def test_a_model_directory(chain: Path, tmp_path: Path, script) -> None:
    done = script("inspect_checkpoint", chain / "model")
    assert done.code == 0, done.err
    assert "model directory of this library" in done.out
    assert done.out.count("fits yes") == 3
    shutil.copytree(chain / "model", tmp_path / "model")
    content = (tmp_path / "model" / "dvae.safetensors").read_bytes()
    (tmp_path / "model" / "dvae.safetensors").write_bytes(content[:-10])
    done = script("inspect_checkpoint", tmp_path / "model")
    assert done.code == 1
    assert "dvae.safetensors cannot be read" in done.err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "3", "is damaged"),
        ("config.json", "null", "is damaged"),
        ("meta.json", '{"kind": ["dvae"]}', "kind ['dvae'], expected"),
        ("meta.json", "3", "is damaged"),
        ("meta.json", '{"kind": "dvae", "format": FORMAT}', "lacks config, inputs, step or ema"),
    ],
)
def test_odd_descriptions(tmp_path: Path, chain: Path, name: str, text: str, message: str) -> None:
    current = json.loads((chain / "model" / "config.json").read_text())["format"]
    (tmp_path / name).write_text(text.replace("FORMAT", str(current)))
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path))
    if "lacks" not in message and name == "meta.json":
        with pytest.raises(ValueError, match=r"dvae, transformer, clip|damaged"):
            LoadedModel.from_pretrained(tmp_path)


REFUSED = {
    "hostile": (lambda path: torch.save(Call(os.system, "touch ran"), path), rf"asks for {os.name}\.system"),
    "empty": (lambda path: path.touch(), "is empty"),
    "truncated": (lambda path: path.write_bytes(pickle.dumps({"a": 1})[:-3]), "cannot be read"),
    "absent": (lambda path: None, "nothing at"),
    "folder": (lambda path: path.mkdir(), "neither a run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_one_line_and_exit_status_1(tmp_path: Path, case: str, script) -> None:
    make, message = REFUSED[case]
    make(tmp_path / "file")
    done = script("inspect_checkpoint", "file", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert len(done.err.strip().splitlines()) == 1
    assert re.search(message, done.err)
    assert not (tmp_path / "ran").exists()


def test_no_path_and_a_directory_for_the_report(tmp_path: Path, state) -> None:
    with pytest.raises(ValueError, match="give a path"):
        inspect_checkpoint(InspectCheckpointArgs())
    torch.save(state, tmp_path / "dvae.pt")
    with pytest.raises(ValueError, match="Is a directory"):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path / "dvae.pt", json=tmp_path))


def test_dalle_mini_is_refused_with_the_reason(tmp_path: Path, script) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x82")
    (tmp_path / "config.json").write_text('{"model_type": "dallebart"}')
    torch.save({f"layers.0.glu.fc0.{w}": torch.zeros(1) for w in ("weight", "bias")}, tmp_path / "mini.pt")
    for name, words in ((".", "dalle-mini"), ("flax_model.msgpack", "encoder"), ("mini.pt", "min-dalle")):
        done = script("inspect_checkpoint", tmp_path / name)
        assert done.code == 1
        assert words in done.err


def test_more_layers_than_tensors_are_refused_before_they_are_built(tmp_path: Path, chain: Path) -> None:
    shutil.copytree(chain / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["parts"]["transformer"]["model_config"]["depth"] = 1000
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="too few for 1000 layers"):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path / "model"))
