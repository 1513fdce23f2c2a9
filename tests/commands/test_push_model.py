"""The push-model command: a dry run, cards that are kept, mistakes, a run."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dalle.commands.push_model import PushModelArgs, main, push_model
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import write_json
from tests.helpers.hub_server import TOKEN

NAME = "someone/shapes"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dry_run_uses_no_network(chain, offline, capsys):
    assert push_model(PushModelArgs(chain / "model", to=NAME, license="mit", dry_run=True)) is None
    output = capsys.readouterr().out
    size = (chain / "model" / "clip.safetensors").stat().st_size
    assert f"would go to {NAME}:" in output
    assert f"{size:,} bytes  clip.safetensors" in output
    card = ModelCard(output.split("README.md:\n\n")[1].split("Nothing was uploaded.")[0])
    assert card.data.license == "mit"
    assert f'from_pretrained("{NAME}")' in card.text


def test_an_edited_card_is_kept_unless_a_report_is_given(chain, hub, tmp_path, monkeypatch):
    shutil.copytree(chain / "model", tmp_path / "model")
    card = b"---\nlicense: mit\n---\nMy own words.\n"
    (tmp_path / "model" / "README.md").write_bytes(card)
    (tmp_path / "model" / "diary.txt").write_text("private")
    before = contents(tmp_path / "model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_model(PushModelArgs(tmp_path / "model", to=NAME))
    pushed = hub.repos[NAME]["main"]
    assert pushed["README.md"] == card
    assert "diary.txt" not in pushed
    write_json(tmp_path / "report.json", {"loss": 1.25})
    push_model(PushModelArgs(tmp_path / "model", to=NAME, report=tmp_path / "report.json"))
    assert b"| loss | 1.25 |" in pushed["README.md"]
    assert contents(tmp_path / "model") == before


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (PushModelArgs(), "expected a model directory or a run"),
        (PushModelArgs(Path("nowhere"), to=NAME), "or a run, got nowhere"),
        (PushModelArgs(Path(), dry_run=True), "run or model directory"),
    ],
)
def test_mistakes(hub, run, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        push_model(run)
    assert hub.asked == []


def test_an_incomplete_directory(chain, tmp_path):
    shutil.copytree(chain / "model", tmp_path / "model")
    (tmp_path / "model" / "text_tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"text_tokenizer\.json; .* incomplete"):
        push_model(PushModelArgs(tmp_path / "model", dry_run=True))


def test_the_script_pushes_a_run(chain, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sys.argv", ["push_model.py", str(chain / "transformer"), "--to", NAME])
    main()
    assert f"is at {hub.url}/{NAME}/commit/" in capsys.readouterr().out
    assert LoadedModel.from_pretrained(NAME).hash == load_model(chain / "transformer", "transformer").hash
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="needs a token"):
        main()
