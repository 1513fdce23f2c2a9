"""Every YAML under configs/: it builds, has the paper's numbers, and trains two steps at a tiny width."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_diffusion import TrainDiffusionArgs, train_diffusion
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import load, read_yaml
from dalle.hub.registry import build_model, load_model
from dalle.meta_device import SkipRandomInit
from dalle.pipelines.dalle import DALLE
from dalle.schedules import Schedule
from dalle.train.loggers import read_log

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {"dvae": TrainDVAEArgs, "transformer": TrainTransformerArgs, "clip": TrainCLIPArgs}
ALL = RUNS | {"diffusion": TrainDiffusionArgs}
FILES = sorted(CONFIGS.glob("*/*.yaml"))
SIZES = ["shapes", "small", "clipart", "paper"]


def read(family: str, size: str):
    return load(RUNS[family], [CONFIGS / family / f"{size}.yaml"])


def names(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def on_meta(family: str, config) -> torch.nn.Module:
    with torch.device("meta"), SkipRandomInit():
        return build_model(family, config)


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("file", FILES, ids=names)
def test_it_builds_and_names_its_command(file):
    run = load(ALL[file.parent.name], [file])
    assert parameters(on_meta(getattr(run.model, "kind", file.parent.name), run.model)) > 0
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    command = f"python scripts/train_{file.parent.name}.py --config configs/{names(file)}.yaml"
    assert any(command in line for line in comments)


@pytest.mark.parametrize("size", SIZES)
def test_the_families_fit_together_and_their_schedules_end_within_the_run(size):
    dvae, transformer, clip = (read(family, size) for family in RUNS)
    side = dvae.data.resolution // dvae.model.downsample_factor
    assert transformer.model.grid == (side, side)
    assert transformer.model.image_vocab == dvae.model.vocab_size
    assert transformer.text.vocab_size <= min(transformer.model.text_vocab, clip.model.text_vocab)
    assert transformer.data == dvae.data
    for run in () if size == "paper" else (dvae, transformer, clip):
        assert run.train.optimizer.lr.decay_steps <= run.steps
    if size == "small":
        assert 30e6 < parameters(on_meta("transformer", transformer.model)) < 60e6


# The paper's numbers.


def test_the_papers_files_hold_nearly_nothing():
    """The defaults are the paper's."""
    files = {family: read_yaml(CONFIGS / family / "paper.yaml") for family in RUNS}
    assert files["transformer"] == files["clip"] == {}
    assert files["dvae"].keys() == {"encode"}


def test_the_papers_dvae():
    """2.1, A.1 to A.3."""
    run = read("dvae", "paper")
    assert (run.steps, run.train.batch_size, run.data.resolution) == (3_000_000, 512, 256)
    assert run.loss.tau == Schedule(1.0, 1 / 16, 150_000, "cosine")
    assert run.loss.beta == Schedule(0.0, 6.6, 5_000, "cosine")
    optimizer = run.train.optimizer
    assert optimizer.lr == Schedule(1e-4, 1.25e-6, 1_200_000, "cosine")
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.warmup_steps, optimizer.max_grad_norm) == (1e-4, 0, None)
    assert (run.train.ema.decay, run.train.ema.update_every) == (0.999, 1)
    assert (run.model.vocab_size, run.model.downsample_factor) == (8192, 8)
    assert run.model.residual_scale is None


def test_the_papers_transformer():
    """2.2, B.1, B.2."""
    run = read("transformer", "paper")
    model = run.model
    assert (model.depth, model.heads, model.head_dim, model.width) == (64, 62, 64, 3968)
    assert (model.text_len, model.grid, model.text_vocab, model.image_vocab) == (256, (32, 32), 16384, 8192)
    assert (model.kinds.count("row"), model.kinds.count("column"), model.kinds.count("conv")) == (47, 16, 1)
    assert (run.steps, run.train.batch_size) == (430_000, 1024)
    optimizer = run.train.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.96, 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm, optimizer.warmup_steps) == (4.5e-2, 4.0, 5000)
    assert optimizer.lr.initial == 4.5e-4
    assert (run.train.ema.decay, run.train.ema.update_every) == (0.99, 25)
    assert (run.loss.text_weight, run.bpe_dropout, run.caption_dropout) == (1 / 8, 0.1, 0.0)
    assert run.text.vocab_size == 16384
    assert parameters(on_meta("transformer", model)) == pytest.approx(12e9, rel=0.05)


def test_the_papers_clip_is_vit_b_16():
    """Radford et al., Tables 18 to 20; 86 million parameters of the image's tower."""
    run = read("clip", "paper")
    assert parameters(on_meta("clip", run.model).net.visual) == pytest.approx(86.2e6, rel=0.01)
    optimizer = run.train.optimizer
    assert (run.train.batch_size, optimizer.weight_decay, optimizer.warmup_steps) == (32_768, 0.2, 2_000)


@pytest.mark.parametrize(
    ("size", "expected", "steps", "batch"),
    [("glide", 3_554_414_086, 2_500_000, 2048), ("glide-upsampler", 1_540_932_998, 1_600_000, 512)],
)
def test_the_models_of_glides_paper(size, expected, steps, batch):
    """Section 4.1: 3.5 billion parameters, 1.5 billion."""
    run = load(TrainDiffusionArgs, [CONFIGS / "diffusion" / f"{size}.yaml"])
    assert parameters(on_meta(run.model.kind, run.model)) == expected
    assert (run.steps, run.train.batch_size, run.low_resolution) == (steps, batch, 64)
    assert (run.model.diffusion.caption_dropout, run.train.ema.decay) == (0.2, 0.9999)


# Two steps.


def finite(run: Path) -> bool:
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    return all(math.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_run_in_order_and_join(tiny_configs, tmp_path, prompt, size):
    """At a tiny width and resolution, with the file's own losses and optimizer."""
    dvae, transformer, clip = (
        load(run, [CONFIGS / family / f"{size}.yaml", tiny_configs / family / "shapes.yaml"])
        for family, run in RUNS.items()
    )
    crop = None if read("dvae", size).crop is None else 16
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    settings = {"data": transformer.data, "text": transformer.text, "captions": 1000}
    train_tokenizer(TrainTokenizerArgs(out=text, **settings))
    train_dvae(replace(dvae, out=tmp_path / "dvae", crop=crop))
    settings = {"dvae": tmp_path / "dvae", "data": dvae.data, "encode": dvae.encode, "device": "cpu"}
    cache = encode_images(EncodeImagesArgs(out=tokens, **settings))
    train_transformer(replace(transformer, out=tmp_path / "transformer", tokens=tokens, text_tokenizer=text))
    train_clip(replace(clip, out=tmp_path / "clip", text_tokenizer=text))
    assert (cache.size, cache.grid) == (24, (4, 4))
    assert all(finite(tmp_path / family) for family in RUNS)
    model = DALLE.from_parts(*(load_model(tmp_path / family, family) for family in RUNS))
    assert len(model.generate(prompt, n=1, best_of=2).images) == 1


DIFFUSION = ("shapes", "upsampler-shapes", "inpaint-shapes", "small", "glide", "glide-upsampler")


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] * (i > 2)) for i, size in enumerate(DIFFUSION)]
)
def test_a_diffusion_model_takes_two_steps(tiny_configs, chain, tmp_path, size):
    """At a tiny width and resolution, with the file's own kind, prediction and optimizer."""
    files = [CONFIGS / "diffusion" / f"{size}.yaml", tiny_configs / "diffusion" / "shapes.yaml"]
    run = load(TrainDiffusionArgs, files)
    text = chain / "text" if run.model.text == "ids" else None
    train_diffusion(replace(run, out=tmp_path, text_tokenizer=text))
    assert finite(tmp_path)
    assert load_model(tmp_path, run.model.kind).model.config == run.model
