"""Every YAML under configs/: it builds, has the paper's numbers, and trains two steps at a tiny width."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import from_dict, load, merge, read_yaml
from dalle.hub.registry import build_model, load_model
from dalle.pipelines.dalle import DALLE
from dalle.schedules import Schedule
from dalle.train.loggers import read_log

CONFIGS = Path(__file__).parents[1] / "configs"
RUNS = {"dvae": TrainDVAEArgs, "transformer": TrainTransformerArgs, "clip": TrainCLIPArgs}
FILES = sorted(CONFIGS.glob("*/*.yaml"))
SIZES = ["shapes", "small", "clipart", "paper"]


def read(family: str, size: str):
    return load(RUNS[family], [CONFIGS / family / f"{size}.yaml"])


def test_each_family_has_each_size():
    assert {names(file) for file in FILES} >= {f"{family}/{size}" for family in RUNS for size in SIZES}


def names(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


@pytest.mark.parametrize("file", FILES, ids=names)
def test_it_builds_and_names_its_command(file):
    run = load(RUNS[file.parent.name], [file])
    with torch.device("meta"):
        model = build_model(file.parent.name, run.model)
    assert sum(p.numel() for p in model.parameters()) > 0
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
        assert 30e6 < parameters("transformer", transformer.model) < 60e6


# The paper's numbers.


def test_the_papers_files_hold_nearly_nothing():
    """The defaults are the paper's."""
    files = {family: read_yaml(CONFIGS / family / "paper.yaml") for family in RUNS}
    assert files["transformer"] == files["clip"] == {}
    assert files["dvae"].keys() == {"encode"}


def parameters(family: str, config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(family, config).parameters())


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
    assert parameters("transformer", model) == pytest.approx(12e9, rel=0.05)


def test_the_papers_clip_is_vit_b_16():
    """Radford et al., Tables 18 to 20; 86 million parameters of the image's tower."""
    run = read("clip", "paper")
    with torch.device("meta"):
        model = build_model("clip", run.model)
    assert sum(p.numel() for p in model.net.visual.parameters()) == pytest.approx(86.2e6, rel=0.01)
    optimizer = run.train.optimizer
    assert (run.train.batch_size, optimizer.weight_decay, optimizer.warmup_steps) == (32_768, 0.2, 2_000)


# Two steps.

COMMON = {"steps": 2, "device": "cpu", "data": {"path": "shapes", "resolution": 16}, "eval_samples": 4}
RHYTHM = {"batch_size": 4, "precision": "fp32", "log_every": 1}


def shrunk(family: str, size: str):
    """The file's run at a tiny width and resolution, with its own losses and optimizer."""
    run = read(family, size)
    if family == "dvae":
        side = 4 * run.model.downsample_factor
        model = {"widths": [4] * len(run.model.widths), "vocab_size": 16, "codebook_dim": 8}
        crop = None if run.crop is None else side // 2
        changes = {"model": model, "encode": {"images": 24}, "data": {"resolution": side}, "crop": crop}
    elif family == "transformer":
        model = {"depth": 4, "heads": 2, "head_dim": 8, "text_len": 20, "grid": [4, 4], "conv_kernel": 3}
        changes = {"model": model | {"text_vocab": 400, "image_vocab": 16}, "text": {"vocab_size": 400}}
    else:
        widths = {"embed_width": 8, "vision_width": 16, "text_width": 16, "head_dim": 8}
        layers = {"vision_layers": 1, "text_layers": 1, "image_size": 16, "patch_size": 8}
        model = widths | layers | {"text_len": 20, "text_vocab": 400}
        changes = {"model": model, "data": {"resolution": 24}}  # twelve cells, so that things can be broken
    data = merge(read_yaml(CONFIGS / family / f"{size}.yaml"), merge(COMMON, changes | {"train": RHYTHM}))
    return from_dict(RUNS[family], data)


def finite(run: Path) -> bool:
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    return all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)


@pytest.mark.parametrize("size", SIZES)
def test_the_stages_run_in_order_and_join(tmp_path, size):
    dvae, transformer, clip = (shrunk(family, size) for family in RUNS)
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    tokenizer = {"data": transformer.data, "text": transformer.text, "captions": 1000}
    train_tokenizer(TrainTokenizerArgs(out=text, **tokenizer))
    train_dvae(replace(dvae, out=tmp_path / "dvae"))
    encode = {"dvae": tmp_path / "dvae", "data": dvae.data, "encode": dvae.encode, "device": "cpu"}
    cache = encode_images(EncodeImagesArgs(out=tokens, **encode))
    train_transformer(replace(transformer, out=tmp_path / "transformer", tokens=tokens, text_tokenizer=text))
    train_clip(replace(clip, out=tmp_path / "clip", text_tokenizer=text))
    assert (cache.size, cache.grid) == (24, (4, 4))
    assert all(finite(tmp_path / family) for family in RUNS)
    model = DALLE.from_parts(*(load_model(tmp_path / family, family) for family in RUNS))
    caption = "a red cross above a blue circle on a white background"
    assert len(model.generate(caption, n=1, best_of=2).images) == 1


def test_shrinking_keeps_the_files_own_settings():
    for size in SIZES:
        small, whole = shrunk("dvae", size), read("dvae", size)
        assert (small.loss, small.train.optimizer) == (whole.loss, whole.train.optimizer)
        assert small.model.residual_scale == whole.model.residual_scale
        assert small.model.downsample_factor == whole.model.downsample_factor
