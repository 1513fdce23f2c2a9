"""The train-transformer command: stages it lacks, and inputs that do not fit."""

import shutil
from pathlib import Path

import pytest

from dalle.train.checkpoint import latest_checkpoint
from tests.helpers.refusals import assert_refused


@pytest.mark.parametrize("missing", [["text", "dvae", "tokens"], []])
def test_the_transformer_makes_the_stages_it_lacks(script, tiny_presets, chain, tmp_path, missing):
    for name in {"text", "tokens", "dvae"}.difference(missing):
        shutil.copytree(chain / name, tmp_path / "runs" / name)
    done = script("train_transformer")
    assert done.code == 0, done.err
    assert "no arguments: using --config" in done.out
    made = [line for line in done.out.splitlines() if "training or encoding first" in line]
    assert [line.split()[1] for line in made] == missing
    assert f"tokens from {Path('runs/tokens')}" in done.out
    assert latest_checkpoint(tmp_path / "runs" / "transformer").name == "step-00000002"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.grid", "5", "5"), r"\[4, 4\], model\.grid is \[5, 5\]"),
        (("--model.image-vocab", "8"), r"16 codes, model\.image_vocab is 8"),
        (("--model.text-vocab", "300"), r"\d+ ids, text_vocab is 300"),
        (("--eval-samples", "24"), "24 images, eval_samples takes 24"),
    ],
)
def test_inputs_that_do_not_fit_the_transformer_are_refused_before_the_first_step(
    script, chain, tiny_configs, tmp_path, words, message
):
    inputs = ("--tokens", chain / "tokens", "--text-tokenizer", chain / "text")
    config = tiny_configs / "transformer" / "shapes.yaml"
    assert_refused(script("train_transformer", "--config", config, *inputs, *words), message)
    assert not (tmp_path / "runs").exists()
