"""The commands of docs/clipart.md, in their order, at the size of seconds, on tars as the page has them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import parse
from dalle.data import TokenCache
from dalle.io.files import read_json
from tests.data.test_dataloader import encoded
from tests.helpers.formats import write_tar

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clipart.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SMALL = "--steps 2 --train.batch-size 4 --device cpu --eval-samples 4"
SMALLER = {  # words put behind a command so that it takes seconds
    "check_data": "--data.workers 0",
    "train_tokenizer": "",
    "train_dvae": f"{SMALL} --data.workers 0 --model.widths 8 8 8",
    "encode_images": "--device cpu --data.workers 0",
    "train_transformer": f"{SMALL} --model.depth 2 --model.heads 1",
    "train_clip": f"{SMALL} --data.workers 0 --model.vision-layers 1 --model.text-layers 1",
    "sample": "--device cpu --best-of 2 --num-images 2",
    "plot": "",
}
LINES = (ROOT / "docs" / "clipart" / "captions.txt").read_text(encoding="utf-8").splitlines()


def name_of(command: str) -> str:
    return Path(command.split()[1]).stem


@pytest.fixture
def place(tmp_path):
    """A checkout with my/clipart256: train-0000.tar, train-0001.tar and val.tar, all with captions of the
    page."""
    for name in ("scripts", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my" / "clipart256").mkdir(parents=True)
    for tar, numbers in {"train-0000": range(16), "train-0001": range(16, 24), "val": range(24, 32)}.items():
        members = []
        for i in numbers:
            members += [
                (f"{i:05}.jpg", encoded("JPEG", (80, 72), i)),
                (f"{i:05}.txt", LINES[i % len(LINES)].encode()),
            ]
        write_tar(tmp_path / "my" / "clipart256" / f"{tar}.tar", members)
    return tmp_path


def test_the_page_names_each_stage_once():
    assert [name_of(command) for command in COMMANDS] == list(SMALLER)


def test_each_configuration_of_the_page_is_there_and_is_a_run():
    for name, schema in (
        ("train_dvae", TrainDVAEArgs),
        ("train_transformer", TrainTransformerArgs),
        ("train_clip", TrainCLIPArgs),
    ):
        (words,) = [shlex.split(command)[2:] for command in COMMANDS if name_of(command) == name]
        file = words[words.index("--config") + 1]
        assert parse(schema, ["--config", str(ROOT / file)]).steps > 2


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_their_order(place, python):
    """About a minute on one core."""
    for command in COMMANDS:
        words = shlex.split(f"{command} {SMALLER[name_of(command)]}")
        done = python(words[1:], place)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    runs = place / "runs" / "clipart"
    report = read_json(place / "runs" / "check" / "report.json")
    assert (report["usable"], report["broken"]["samples"]) == (32, 0)
    cache = TokenCache(runs / "tokens")
    assert (cache.size, cache.crops, cache.grid) == (24, 4, (16, 16))
    records = (runs / "samples" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(record)["prompt"] for record in records] == [line for line in LINES for _ in range(2)]
    assert np.asarray(Image.open(runs / "losses.png")).std() > 1
