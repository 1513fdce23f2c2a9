"""The pages on training and scaling: their commands run, and what they print is what the pages show.

python tests/docs/test_docs.py writes the blocks of docs/scaling.md anew.
"""

import math
import re
import shlex
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from dalle.commands.plan import PLANS, plan_training
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import load, parse
from dalle.runs.kinds import take_kind

ROOT = Path(__file__).parents[2]
SCALING, TRAINING = ROOT / "docs" / "scaling.md", ROOT / "docs" / "training.md"
BLOCK = re.compile(r"```sh\n(python scripts/plan\.py [^\n]*)\n```\n\n```text\n(.*?)```", re.DOTALL)
PLANNED = BLOCK.findall(SCALING.read_text(encoding="utf-8"))
COMMANDS = re.findall(r"```sh\n([^\n]*)\n```", TRAINING.read_text(encoding="utf-8"))
QUICK = "--device cpu --train.batch-size 4 --train.eval-every 100"
SMALLER = {  # words put behind a command so that it takes seconds
    "overfit": "--steps 2",
    "sweep": "--steps 2",
    "tuned": "--steps 2",
    "two": "--steps 2",
}


def planned(command: str) -> str:
    """What a command of scripts/plan.py prints, without a process of its own."""
    kind, words = take_kind(shlex.split(command)[2:])
    words[words.index("--config") + 1] = str(ROOT / words[words.index("--config") + 1])
    said = StringIO()
    with redirect_stdout(said):
        plan_training(kind, parse(PLANS[kind], words))
    return said.getvalue()


@pytest.mark.parametrize(
    ("command", "shown"),
    [pytest.param(*block, id=str(i), marks=[pytest.mark.slow] * (i > 0)) for i, block in enumerate(PLANNED)],
)
def test_the_page_shows_what_plan_prints(command, shown):
    assert planned(command) == shown, "python tests/docs/test_docs.py writes the blocks anew"


def test_the_page_has_its_commands():
    assert len(PLANNED) == 4
    assert SCALING.read_text(encoding="utf-8").count("```sh") == 4


@pytest.mark.parametrize("size", ["shapes", "small", "paper"])
def test_the_losses_at_the_start_are_those_of_the_configurations(size):
    model = load(TrainTransformerArgs, [ROOT / "configs" / "transformer" / f"{size}.yaml"]).model
    row = f"| {model.text_vocab:,} | {math.log(model.text_vocab):.2f} | {model.image_vocab:,} | "
    assert row + f"{math.log(model.image_vocab):.2f} |" in TRAINING.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(chain, tiny_configs, tmp_path_factory) -> Path:
    """A checkout after a tiny quick start, in which shapes.yaml is the tiny one."""
    place = tmp_path_factory.mktemp("docs")
    (place / "scripts").symlink_to(ROOT / "scripts")
    shutil.copytree(tiny_configs, place / "configs")
    for part, name in (("text", "text"), ("tokens", "tokens"), ("model", "quickstart/model")):
        shutil.copytree(chain / part, place / "runs" / name)
    return place


@pytest.mark.parametrize("command", COMMANDS, ids=[c.split("--out runs/")[1] for c in COMMANDS])
def test_the_commands_of_training_run(command, workplace, typed, python):
    name = command.split("--out runs/")[1]
    command = f"{command} {QUICK} {SMALLER[name]}"
    if command.startswith("torchrun "):
        done = python(["-m", "torch.distributed.run", *shlex.split(command)[1:]], workplace)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        typed(command, workplace)
    assert list((workplace / "runs" / name).rglob("log.jsonl"))


def test_every_command_is_tested():
    assert TRAINING.read_text(encoding="utf-8").count("```sh") == len(COMMANDS) == len(SMALLER)


if __name__ == "__main__":
    text = SCALING.read_text(encoding="utf-8")
    text = BLOCK.sub(lambda found: f"```sh\n{found[1]}\n```\n\n```text\n{planned(found[1])}```", text)
    SCALING.write_text(text, encoding="utf-8")
