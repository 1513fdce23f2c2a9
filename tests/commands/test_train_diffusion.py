"""The train-diffusion command: what a run holds, fine-tuning for inpainting, and settings that do not fit."""

from dataclasses import replace

import pytest
import torch

from dalle.commands.train_diffusion import TrainDiffusionArgs, train_diffusion
from dalle.data.config import DataConfig
from dalle.hub.registry import LoadedModel, load_model
from dalle.text import load_text_tokenizer
from dalle.train.loggers import read_log
from dalle.unet import UNetConfig


@pytest.fixture(scope="module")
def base(tiny_runs, chain, with_inputs, tmp_path_factory):
    return train_diffusion(with_inputs(tiny_runs.diffusion, chain, out=tmp_path_factory.mktemp("base")))


def test_a_run_names_its_text_tokenizer_and_logs_quarters_bits_and_samples(base, chain, tmp_path):
    text = load_text_tokenizer(chain / "text" / "text_tokenizer.json")
    loaded = load_model(base, "base")
    assert loaded.inputs["text_hash"] == text.hash
    first, *_, last = read_log(base / "log.jsonl")
    assert {"loss", "mse", "vlb", "mse_q1", "mse_q4"} <= first.keys()
    assert {"val/loss", "val/mse_q2", "val/bits_per_dim"} <= last.keys()
    assert list(base.glob("samples-*.png"))
    loaded.save_pretrained(tmp_path)
    assert LoadedModel.from_pretrained(tmp_path).hash == loaded.hash
    assert (tmp_path / "text_tokenizer.json").is_file()


def test_fine_tuning_for_inpainting_begins_as_the_same_function(
    base, tiny_runs, chain, with_inputs, tmp_path
):
    """The learning rate is 0: its weights are those it began with."""
    run = tiny_runs.diffusion
    optimizer = replace(run.train.optimizer, lr=replace(run.train.optimizer.lr, initial=0.0, final=0.0))
    inpaint = with_inputs(
        run,
        chain,
        out=tmp_path,
        steps=1,
        model=replace(run.model, inpainting=True),
        init_from=base,
        train=replace(run.train, optimizer=optimizer),
    )
    train_diffusion(inpaint)
    old, new = (load_model(path, "base", averaged=False).model for path in (base, tmp_path))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 40])
    text = torch.tensor([[5] * 20, [400] * 20])
    known, mask = torch.randn(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    found, expected = new(x, t, text=text, known=known, mask=mask), old(x, t, text=text)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert not new.input_blocks[0][0].weight[:, 3:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": DataConfig(resolution=32)}, "data.resolution 32 must be model.image_size 64"),
        ({"model": UNetConfig(low_resolution=True)}, "low_resolution must be below 64"),
        ({"model": UNetConfig(classes=3)}, "class_names has 0 names, model.classes is 3"),
        ({"model": UNetConfig(text="clip")}, "cannot be trained yet"),
        ({"eval_steps": 1001}, "eval_steps must be 2 to 1000, got 1001"),
        ({"blurred": 2.0}, r"blurred must be in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainDiffusionArgs(**changes)


def test_the_defaults_are_glides():
    assert TrainDiffusionArgs().model == UNetConfig()
