"""scripts/inspect_checkpoint.py: what a checkpoint is, and one line with exit status 1 for what it will not open."""

import hashlib
import json
import os
import pickle
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.dvae import DVAE, DVAEConfig
from dalle.hub.registry import LoadedModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "inspect_checkpoint.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[..., SimpleNamespace]:
    """script(*words) -> .code .out .err as a shell would see."""

    def run(*words: str | Path) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["scripts/inspect_checkpoint.py", *map(str, words)])
        code, said = 0, ""
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            code, said = (1, str(stop.code)) if isinstance(stop.code, str) else (stop.code or 0, "")
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err + said)

    return run


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(
        DVAE(
            DVAEConfig(
                widths=(8, 16), blocks_per_group=1, downsample_factor=2, vocab_size=24, codebook_dim=12
            )
        ).state_dict()
    )


def test_a_whole_published_file(tmp_path: Path, state, script) -> None:
    torch.save(state, tmp_path / "dvae.pt")
    done = script(tmp_path / "dvae.pt", "--json", tmp_path / "report.json")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["family"], report["kind"], report["container"]) == (
        "OpenAI dVAE",
        "image tokenizer",
        "torch zip",
    )
    assert report["sizes"]["widths"] == [8, 16]
    assert report["vocabulary"] == "24 codes, 2 x 2 pixels each"
    assert report["fits"] is True
    assert report["parameters"] == report["numbers"] == sum(t.numel() for t in state.values())
    assert "modified MIT" in report["license"]
    assert report["sha256"] == {"dvae.pt": hashlib.sha256((tmp_path / "dvae.pt").read_bytes()).hexdigest()}
    for word in ("OpenAI dVAE", "24 codes", "modified MIT", report["sha256"]["dvae.pt"]):
        assert word in done.out


def test_what_is_missing_extra_and_misshapen_is_told(tmp_path: Path, state) -> None:
    changed = dict(state) | {"encoder.more": torch.zeros(1)}
    del changed["decoder.blocks.input.b"]
    changed["encoder.blocks.input.w"] = changed["encoder.blocks.input.w"][:, :2]
    torch.save(changed, tmp_path / "dvae.pt")
    report = inspect_checkpoint(InspectCheckpointArgs(tmp_path / "dvae.pt"))
    assert report["fits"] is False
    assert (report["missing"], report["unexpected"]) == (["decoder.blocks.input.b"], ["encoder.more"])
    assert report["wrong_shape"] == ["encoder.blocks.input.w: (8, 2, 7, 7), not (8, 3, 7, 7)"]


def test_one_half_of_the_dvae_is_told_to_be_one(tmp_path: Path, state) -> None:
    half = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder")}
    torch.save(half, tmp_path / "encoder.pkl")
    report = inspect_checkpoint(InspectCheckpointArgs(tmp_path / "encoder.pkl"))
    assert (report["family"], report["fits"]) == ("OpenAI dVAE", False)
    assert "only the encoder" in report["note"]


def test_a_file_of_nobody(tmp_path: Path) -> None:
    torch.save({"lonely.weight": torch.zeros(2)}, tmp_path / "x.pt")
    assert "lonely.weight" in inspect_checkpoint(InspectCheckpointArgs(tmp_path / "x.pt"))["note"]
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    assert "no tensors" in inspect_checkpoint(InspectCheckpointArgs(tmp_path / "x.pt"))["note"]


def test_names_of_strangers_cannot_write_on_the_terminal(tmp_path: Path, script) -> None:
    torch.save({"\x1b[31m": torch.zeros(2)}, tmp_path / "x.pt")
    assert "\x1b" not in script(tmp_path / "x.pt").out


@pytest.mark.parametrize("part", ["dvae", "transformer", "clip"])
def test_a_run_of_this_library(chain: Path, part: str, script) -> None:
    done = script(chain / part)
    assert done.code == 0, done.err
    for word in (f"{part} of this library", "fits         yes", "step         2 of 2", "sha256"):
        assert word in done.out


def test_a_model_directory(chain: Path, script) -> None:
    done = script(chain / "model")
    assert done.code == 0, done.err
    assert "model directory of this library" in done.out
    assert done.out.count("fits yes") == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "3", "is neither a run, a checkpoint nor a model directory"),
        ("config.json", "null", "is neither a run"),
        ("meta.json", '{"kind": ["dvae"]}', "of kind ['dvae'], expected one of dvae, transformer, clip"),
        ("meta.json", "3", "of kind None, expected"),
        ("meta.json", '{"kind": "dvae", "format": 4}', "meta.json lacks config, step, steps; it is damaged"),
    ],
)
def test_odd_descriptions_are_told(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path))


def test_a_damaged_own_file(chain: Path, tmp_path: Path, script) -> None:
    shutil.copytree(chain / "model", tmp_path / "model")
    content = (tmp_path / "model" / "dvae.safetensors").read_bytes()
    (tmp_path / "model" / "dvae.safetensors").write_bytes(content[:-10])
    done = script(tmp_path / "model")
    assert done.code == 1
    assert "dvae.safetensors cannot be read" in done.err


class Attack:
    def __reduce__(self) -> tuple:
        return os.system, ("touch ran",)


def hostile(path: Path) -> None:
    torch.save({"state_dict": Attack()}, path)


REFUSED = {
    "hostile": (hostile, rf"asks for {os.name}\.system"),
    "bare": (lambda path: path.write_bytes(pickle.dumps(Attack(), 0)), rf"asks for {os.name}\.system"),
    "empty": (lambda path: path.touch(), "is empty"),
    "text": (lambda path: path.write_text("hello world, I am text"), "text file"),
    "truncated": (lambda path: path.write_bytes(pickle.dumps({"a": 1})[:-3]), "cannot be read"),
    "absent": (lambda path: None, "nothing at"),
    "folder": (lambda path: path.mkdir(), "neither a run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_will_not_open_is_one_line_and_exit_status_1(
    tmp_path: Path, case: str, python, monkeypatch: pytest.MonkeyPatch, script
) -> None:
    make, said = REFUSED[case]
    make(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    done = script(tmp_path / "file")
    assert done.code == 1
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=said):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path / "file"))


def test_as_a_user_types_it(tmp_path: Path, python) -> None:
    hostile(tmp_path / "model.pt")
    done = python(["scripts/inspect_checkpoint.py", "model.pt"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{os.name}.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_no_path_and_a_directory_for_the_report(tmp_path: Path, state) -> None:
    with pytest.raises(ValueError, match="give a path"):
        inspect_checkpoint(InspectCheckpointArgs())
    torch.save(state, tmp_path / "dvae.pt")
    with pytest.raises(ValueError, match="is a directory"):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path / "dvae.pt", json=tmp_path))


def test_dalle_mini_is_refused_with_the_reason(tmp_path: Path, script) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x82")
    (tmp_path / "config.json").write_text('{"model_type": "dallebart"}')
    for path in (tmp_path, tmp_path / "flax_model.msgpack"):
        done = script(path)
        assert done.code == 1
        assert "dalle-mini" in done.err
        assert "encoder" in done.err
    torch.save(
        {f"layers.0.glu.fc0.{w}": torch.zeros(1) for w in ("weight", "bias")}, tmp_path / "encoder_mini.pt"
    )
    assert "min-dalle" in script(tmp_path / "encoder_mini.pt").err


@pytest.mark.parametrize("text", ["3", '{"kind": ["dvae"]}'])
def test_a_part_of_an_odd_description_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"holds .*, expected one of dvae, transformer, clip"):
        LoadedModel.from_pretrained(tmp_path)
