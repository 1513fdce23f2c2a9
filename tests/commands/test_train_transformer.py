"""The train-transformer command: stages it lacks, and inputs that do not fit."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.commands.train_transformer import train_transformer
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.loggers import read_log
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


def test_losses_of_an_evaluation_in_bf16_are_fp32(tiny_runs, chain, with_inputs, tmp_path):
    """Their means too: under autocast a product of matrices would round them to 8 bits."""
    train = replace(tiny_runs.transformer.train, precision="bf16")
    train_transformer(with_inputs(tiny_runs.transformer, chain, out=tmp_path, steps=1, train=train))
    (line,) = [line for line in read_log(tmp_path / "log.jsonl") if "val/loss" in line]
    values = torch.tensor([line[f"val/{name}"] for name in ("loss", "text_loss", "image_loss")])
    assert (values.bfloat16() != values).all()
