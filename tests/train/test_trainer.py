"""Training: exact resuming, checkpoints that survive a crash, errors that name what is wrong (dalle/train).

What does not depend on a family is tested on a line, y = w x, which trains in milliseconds.
"""

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.commands.encode_images import encode_images
from dalle.commands.train_clip import train_clip
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_transformer import train_transformer
from dalle.data import TokenCache
from dalle.data.token_cache import TokenCacheSpec, TokenWriter
from dalle.hub.registry import load_model, weights_hash
from dalle.io.files import write_checksums
from dalle.pipelines.dalle import DALLE
from dalle.runs.batches import TokenBatches
from dalle.schedules import Schedule
from dalle.text import load_text_tokenizer
from dalle.train import TrainConfig, Trainer, checkpoint
from dalle.train import trainer as loop
from dalle.train.checkpoint import latest_checkpoint, restore
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.ema import EMA, bias_corrected
from dalle.train.loggers import JSONLLogger, read_log
from dalle.train.optimizer import build_optimizers
from dalle.train.state import TrainState
from dalle.types import ImageTextBatch, Loss

STAGES = {"dvae": train_dvae, "transformer": train_transformer, "clip": train_clip}
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
CLOCKS = {"step_time", "data_time_frac", "max_memory_gib", "samples_per_sec", "tokens_per_sec"}
STEPS = 7


def tensors(run: Path) -> dict[str, Tensor]:
    """Weights, running sums and moments of a run's newest checkpoint."""
    folder = latest_checkpoint(run)
    return {f"{file}/{name}": t for file in FILES for name, t in load_file(folder / file).items()}


def assert_same_state(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    metas = [json.loads((latest_checkpoint(run) / "meta.json").read_text()) for run in (one, other)]
    assert metas[0] == metas[1]


def log_of(run: Path, evaluations: bool = False) -> list[dict]:
    """The lines of training, or those of evaluations, without the clock's readings."""
    lines = read_log(run / "log.jsonl")
    return [
        {k: v for k, v in line.items() if k not in CLOCKS}
        for line in lines
        if ("loss" not in line) == evaluations
    ]


# ---------------------------------------------------------------------------------------------
# N steps == k, a resume, N - k; bit for bit
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny_runs, chain, with_inputs):
    """start(kind, out, **changes): that stage's run on the inputs of `chain`."""

    def run(kind: str, out: Path, steps: int = STEPS, **changes) -> Path:
        base = getattr(tiny_runs, kind)
        train = replace(base.train, **changes.pop("train", {}))
        return STAGES[kind](with_inputs(base, chain, out=out, steps=steps, train=train, **changes))

    return run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """whole(kind): the run of that stage that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return lambda kind: folder / kind if (folder / kind).exists() else start(kind, folder / kind)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("stop", [1, 3, 4])
def test_stopping_and_going_on_changes_nothing(kind, stop, start, whole, tmp_path):
    """Between two averagings and on one; with an evaluation at the stop that the whole run lacks."""
    start(kind, tmp_path, steps=stop)
    start(kind, tmp_path)
    assert_same_state(tmp_path, whole(kind))
    assert log_of(tmp_path) == log_of(whole(kind))


@pytest.mark.parametrize("kind", STAGES)
def test_a_run_that_dies_goes_on_from_its_last_checkpoint(kind, start, whole, tmp_path, monkeypatch):
    """It dies in step 6, after the checkpoint of step 4; step 5 is made again and logged once."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies_at(6))
        with pytest.raises(RuntimeError, match="power cut"):
            start(kind, tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000004"
    assert log_of(tmp_path)[-1]["step"] == 5
    start(kind, tmp_path)
    assert_same_state(tmp_path, whole(kind))
    assert log_of(tmp_path) == log_of(whole(kind))
    assert log_of(tmp_path, evaluations=True) == log_of(whole(kind), evaluations=True)


def dies_at(step: int):
    train_step = loop.train_step

    def dying(state, *rest):
        if state.step + 1 == step:
            raise RuntimeError("power cut")
        return train_step(state, *rest)

    return dying


def test_a_fresh_process_goes_on_the_same(start, whole, chain, tiny_configs, tmp_path, python):
    start("transformer", tmp_path / "run", steps=3)
    words = [
        "--config",
        tiny_configs / "transformer" / "shapes.yaml",
        "--out",
        tmp_path / "run",
        "--steps",
        STEPS,
    ]
    inputs = ["--tokens", chain / "tokens", "--text-tokenizer", chain / "text"]
    done = python(["scripts/train_transformer.py", *words, *inputs], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 3" in done.stdout
    assert_same_state(tmp_path / "run", whole("transformer"))


@pytest.mark.parametrize("kind", ["dvae", "transformer"])
def test_resuming_is_exact_in_bf16_too(kind, start, tmp_path):
    start(kind, tmp_path / "whole", steps=4, train={"precision": "bf16"})
    for steps in (1, 4):
        start(kind, tmp_path / "split", steps=steps, train={"precision": "bf16"})
    assert_same_state(tmp_path / "whole", tmp_path / "split")


@pytest.mark.parametrize("kind", ["transformer", "clip"])
def test_resuming_is_exact_with_muon_too(kind, start, tiny_runs, tmp_path):
    optimizer = {"optimizer": replace(getattr(tiny_runs, kind).train.optimizer, muon_lr_scale=5.0)}
    start(kind, tmp_path / "whole", steps=4, train=optimizer)
    for steps in (1, 4):
        start(kind, tmp_path / "split", steps=steps, train=optimizer)
    assert_same_state(tmp_path / "whole", tmp_path / "split")
    assert any(name.endswith("momentum_buffer") for name in tensors(tmp_path / "whole"))


def test_going_on_with_other_tokens_is_refused(tiny_runs, with_inputs, chain, tmp_path):
    run = with_inputs(tiny_runs.transformer, chain, out=tmp_path / "run", steps=1)
    train_transformer(run)
    own = TokenCache(chain / "tokens")
    encode = replace(tiny_runs.encode, data=replace(tiny_runs.encode.data, shapes_seed=1))
    other = encode_images(replace(encode, dvae=chain / "dvae", out=tmp_path / "tokens"))
    with pytest.raises(
        ValueError, match=rf"another configuration \(inputs\.tokens was '{own.hash}', is '{other.hash}'"
    ):
        train_transformer(replace(run, tokens=tmp_path / "tokens", steps=2))


def test_tokens_of_another_dvae_are_refused_with_both_hashes(tiny_runs, with_inputs, chain, tmp_path):
    train_dvae(replace(tiny_runs.dvae, out=tmp_path / "other", seed=9, steps=1))
    run = with_inputs(tiny_runs.transformer, chain, out=tmp_path / "run", steps=1)
    hashes = [load_model(path / name, "dvae").hash for path, name in ((chain, "dvae"), (tmp_path, "other"))]
    with pytest.raises(
        ValueError, match=f"tokens of dVAE {hashes[0]}, .*other is {hashes[1]}: they do not belong"
    ):
        train_transformer(replace(run, dvae=tmp_path / "other"))
    train_transformer(replace(run, dvae=chain / "dvae"))


@pytest.fixture
def two_crops(tmp_path) -> TokenCache:
    """Twelve images in two crops, tokens 0 .. 15; a caption names its image."""
    plan = TokenCacheSpec(dvae="d", data="p", grid=(4, 4), vocab=16, images=12, crops=2, shard=5)
    writer = TokenWriter(tmp_path / "tokens", plan)
    tokens = np.random.default_rng(0).integers(16, size=(12, 2, 16))
    for shard in writer.missing():
        numbers = plan.numbers(shard)
        writer.write(shard, tokens[numbers], numbers, [[f"number {n}"] for n in numbers])
    return writer.finish()


def test_no_crop_of_a_held_out_image_is_trained_on(two_crops, chain, tiny_runs):
    """The last four of twelve images are held out, and an epoch is both crops of the other eight."""
    run = replace(
        tiny_runs.transformer, eval_samples=4, train=replace(tiny_runs.transformer.train, batch_size=16)
    )
    batches = TokenBatches(
        two_crops, load_text_tokenizer(chain / "text" / "text_tokenizer.json"), run.model.layout, run
    )
    _, image = run.model.layout.unpack(batches(0))
    images = [p for p in range(8) for _ in range(2)]
    expected = two_crops.image_tokens(images, [0, 1] * 8)
    assert sorted(image.tolist()) == sorted(expected.tolist())
    assert torch.equal(run.model.layout.unpack(batches.val())[1], two_crops.image_tokens([8, 9, 10, 11]))


def test_caption_and_image_of_a_sample_belong_together(two_crops, chain, tiny_runs):
    run = replace(tiny_runs.transformer, eval_samples=4, bpe_dropout=0.0)
    text = load_text_tokenizer(chain / "text" / "text_tokenizer.json")
    batches = TokenBatches(two_crops, text, run.model.layout, run)
    captions = {
        tuple(run.model.layout.pad_text([text.encode(f"number {n}")])[0].tolist()): n for n in range(8)
    }
    for step in range(4):
        text_tokens, image_tokens = (part.tolist() for part in run.model.layout.unpack(batches(step)))
        for words, tokens in zip(text_tokens, image_tokens, strict=True):
            assert tokens in two_crops.image_tokens([captions[tuple(words)]] * 2, [0, 1]).tolist()


@pytest.mark.parametrize("kind", STAGES)
def test_evaluating_changes_nothing(kind, start, whole, tmp_path):
    start(kind, tmp_path, train={"eval_every": 1})
    assert len(log_of(tmp_path, evaluations=True)) > len(log_of(whole(kind), evaluations=True))
    a, b = tensors(tmp_path), tensors(whole(kind))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_seed_is_another_run(start, whole, tmp_path):
    start("dvae", tmp_path, seed=1)
    assert weights_hash(load_model(tmp_path, "dvae").model) != weights_hash(
        load_model(whole("dvae"), "dvae").model
    )


def test_the_transformers_samples_span_epochs(chain, tiny_runs):
    """Or the tests above would not show that the order survives a resume in mid-epoch."""
    images = tiny_runs.encode.encode.images - tiny_runs.transformer.eval_samples
    assert STEPS * tiny_runs.transformer.train.batch_size > images


def test_the_log_of_a_whole_run_has_each_step_once(whole):
    assert [line["step"] for line in log_of(whole("clip"))] == list(range(1, STEPS + 1))
    assert [line["step"] for line in log_of(whole("clip"), evaluations=True)] == [2, 4, 6, 7]


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


class Line(nn.Module):
    """y = w x + b."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def squared_error(model: nn.Module, batch: Tensor, step: int) -> Loss:
    noise = torch.randn_like(batch)
    return Loss((model(batch) - 2 * batch - 0.1 * noise).square().mean())


CONFIG = TrainConfig(
    batch_size=4,
    optimizer=OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0),
    ema=EMAConfig(decay=0.9, update_every=1),
    precision="fp32",
    log_every=1,
    save_every=1,
    keep_last=2,
    max_skipped_steps=1,
)


def fit_line(
    out: Path,
    steps: int,
    objective=squared_error,
    model=None,
    resume="auto",
    run=None,
    inputs=None,
    **changes,
):
    torch.manual_seed(0)
    meta = {"kind": "line", "config": run or {}, "inputs": inputs or {}}
    return Trainer(
        model or Line(),
        objective,
        lambda step: torch.linspace(-1, 1, 4)[:, None] + step,
        replace(CONFIG, **changes),
        steps=steps,
        seed=0,
        run_dir=out,
        meta=meta,
        resume=resume,
    ).train()


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def fresh_state() -> TrainState:
    model = Line()
    return TrainState(model, build_optimizers(model, CONFIG.optimizer), EMA(model, CONFIG.ema))


@pytest.fixture
def crash(monkeypatch):
    """crash(where, n): the n-th call of that function from now on leaves half its work and raises."""

    def arm(where: str, n: int) -> None:
        owner, name = {
            "write_tensors": (checkpoint, "write_tensors"),
            "replace": (os, "replace"),
            "sync": (os, "fsync"),
            "rmtree": (shutil, "rmtree"),
        }[where]
        whole, calls = getattr(owner, name), 0

        def failing(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls < n:
                return whole(*args, **kwargs)
            if name == "write_tensors":
                Path(args[0]).write_bytes(b"half a file")
            raise OSError("no space left on device")

        monkeypatch.setattr(owner, name, failing)

    return arm


# One checkpoint: three tensor files; renames of meta.json, SHA256SUMS, the folder and the pointer; a sync of
# each file and of the folders; removals of a folder of the same name and of the oldest one. The log is
# renamed before.
CRASHES = [("write_tensors", n) for n in (1, 2, 3)] + [("replace", n) for n in (2, 3, 4, 5)]
CRASHES += [("sync", n) for n in range(2, 10)] + [("rmtree", n) for n in (1, 2)]


@pytest.mark.parametrize(("where", "n"), CRASHES)
def test_a_crash_at_any_write_leaves_a_whole_checkpoint(where, n, crash, tmp_path, monkeypatch):
    fit_line(tmp_path / "whole", steps=5)
    fit_line(tmp_path / "run", steps=3)
    with monkeypatch.context():
        crash(where, n)
        with pytest.raises(OSError, match="no space left"):
            fit_line(tmp_path / "run", steps=4)
        monkeypatch.undo()
    folder = latest_checkpoint(tmp_path / "run")
    found = fresh_state()
    restore(folder, found)
    assert found.step == (4 if where == "rmtree" and n == 2 else 3)
    fit_line(tmp_path / "run", steps=5)
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert folders(tmp_path / "run") == ["latest", "step-00000004", "step-00000005"]


def test_there_are_no_writes_that_the_crashes_above_miss(tmp_path, monkeypatch):
    counts = dict.fromkeys(("write_tensors", "replace", "sync"), 0)

    def counting(name, call):
        def counted(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return counted

    monkeypatch.setattr(checkpoint, "write_tensors", counting("write_tensors", checkpoint.write_tensors))
    monkeypatch.setattr(os, "replace", counting("replace", os.replace))
    monkeypatch.setattr(os, "fsync", counting("sync", os.fsync))
    fit_line(tmp_path, steps=1)
    counts = {name: count - (name != "write_tensors") for name, count in counts.items()}  # less the log's
    assert counts == {name: sum(where == name for where, _ in CRASHES) for name in counts}


@pytest.mark.parametrize("keep", [1, 2, 3, 10])
def test_the_newest_are_kept(keep, tmp_path):
    fit_line(tmp_path, steps=5, keep_last=keep)
    kept = [f"step-{step:08d}" for step in range(1, 6)][-keep:]
    assert folders(tmp_path) == ["latest", *kept]
    assert latest_checkpoint(tmp_path).name == "step-00000005"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_folder_that_a_crash_left_ahead_never_pushes_out_the_newest(keep, tmp_path):
    """Killed between the folder's rename and the pointer's, then gone on with a smaller step."""
    fit_line(tmp_path, steps=3, keep_last=keep)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000003", tmp_path / "checkpoints" / "step-00000009")
    fit_line(tmp_path, steps=4, keep_last=keep)
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_checkpoint_describes_itself(chain):
    meta = json.loads((latest_checkpoint(chain / "transformer") / "meta.json").read_text())
    assert meta.keys() == {
        "format",
        "kind",
        "model_config",
        "config",
        "inputs",
        "versions",
        "steps",
        "step",
        "ema",
        "extras",
    }
    assert meta["kind"] == "transformer"
    assert meta["model_config"]["depth"] == 2
    assert meta["config"]["train"]["batch_size"] == 4
    assert meta["inputs"]["dvae"] == load_model(chain / "dvae", "dvae").hash
    assert meta["inputs"]["text"]["merges"]


def test_a_pointer_to_a_folder_that_is_gone_is_an_error(tmp_path):
    fit_line(tmp_path, steps=1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(ValueError, match="names step-00000001, which is not there"):
        latest_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------
# Which runs may go on
# ---------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_and_its_differences_named(start, tmp_path):
    start("dvae", tmp_path, steps=1)
    with pytest.raises(
        ValueError, match=r"another configuration .*train\.batch_size was 4, is 5.*another --out"
    ):
        start("dvae", tmp_path, train={"batch_size": 5})
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        start("dvae", tmp_path, seed=1)


def test_refusing_leaves_the_run_as_it_was(tmp_path):
    fit_line(tmp_path, steps=2, run={"a": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="a was 1, is 2"):
        fit_line(tmp_path, steps=3, run={"a": 2})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_other_inputs_are_refused(tmp_path):
    """The same configuration, but the tokens come from another dVAE now."""
    fit_line(tmp_path, steps=1, inputs={"dvae": "aaaa"})
    with pytest.raises(ValueError, match=r"inputs\.dvae was 'aaaa', is 'bbbb'"):
        fit_line(tmp_path, steps=2, inputs={"dvae": "bbbb"})


def test_inputs_may_move(chain, tiny_runs, with_inputs, tmp_path):
    """What counts is what they hold, which the inputs say."""
    run = with_inputs(tiny_runs.transformer, chain, out=tmp_path / "run", steps=1)
    train_transformer(run)
    shutil.copytree(chain / "tokens", tmp_path / "tokens")
    shutil.copy(chain / "text" / "text_tokenizer.json", tmp_path)
    train_transformer(
        replace(run, steps=2, tokens=tmp_path / "tokens", text_tokenizer=tmp_path / "text_tokenizer.json")
    )
    assert latest_checkpoint(tmp_path / "run").name == "step-00000002"


def test_a_run_of_another_kind_is_refused(start, tmp_path):
    start("dvae", tmp_path, steps=1)
    with pytest.raises(ValueError, match="holds 'dvae', expected 'transformer'"):
        start("transformer", tmp_path, steps=1)


def test_steps_and_device_may_change(start, tmp_path):
    start("dvae", tmp_path, steps=1, device="auto" if not torch.cuda.is_available() else "cpu")
    start("dvae", tmp_path, steps=2, device="cpu")
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_a_finished_run_is_left_as_it_is(tmp_path):
    fit_line(tmp_path, steps=2)
    before = latest_checkpoint(tmp_path).stat().st_mtime_ns
    assert fit_line(tmp_path, steps=2).step == 2
    assert latest_checkpoint(tmp_path).stat().st_mtime_ns == before


def test_never_refuses_a_directory_that_holds_a_run(tmp_path):
    fit_line(tmp_path, steps=1)
    with pytest.raises(ValueError, match="holds a run; give another --out, or --resume auto"):
        fit_line(tmp_path, steps=2, resume="never")


def test_never_takes_a_new_directory(tmp_path):
    assert fit_line(tmp_path / "new", steps=1, resume="never").step == 1


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"cannot write to .*file.*; give another --out"):
        fit_line(tmp_path / "file", steps=1)
    with pytest.raises(ValueError, match=r"cannot write to .*run.*; give another --out"):
        fit_line(tmp_path / "file" / "run", steps=1)


# ---------------------------------------------------------------------------------------------
# Numbers that are not finite
# ---------------------------------------------------------------------------------------------


def test_nan_in_pixels_is_named(start, tmp_path, monkeypatch):
    def with_nan(pairs, samples, *rest, **more):
        return ImageTextBatch(
            np.full((len(samples), 3, 32, 32), np.nan, np.float32),
            [["nothing"]] * len(samples),
            list(samples),
        )

    monkeypatch.setattr("dalle.shapes.dataset.ShapesDataset.load", with_nan)
    with pytest.raises(ValueError, match="pixels hold NaN"):
        start("dvae", tmp_path)


@pytest.mark.parametrize("kind", STAGES)
def test_a_nan_weight_is_named(kind, start, tmp_path, monkeypatch):
    """Planted in the last parameter, as if an update had gone wrong."""
    train_step, planted = loop.train_step, []

    def poisoned(state, *rest):
        name, parameter = list(state.model.named_parameters())[-1]
        if state.step == 1:
            planted.append(name)
            parameter.data.view(-1)[0] = torch.nan
        return train_step(state, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match=r"^step 2: .* first bad tensor: parameter ") as caught:
        start(kind, tmp_path, train={"max_skipped_steps": 1})
    assert f"parameter {planted[0]}." in str(caught.value)


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e30 * 1e30


def test_the_first_module_whose_output_is_not_finite_is_named(tmp_path):
    model = nn.Sequential(Line(), Overflow(), Line())
    with pytest.raises(FloatingPointError, match="first bad tensor: output of 1"):
        fit_line(tmp_path, steps=1, model=model)


def test_a_gradient_that_is_not_finite_is_named(tmp_path):
    def root_at_zero(model, batch, step):
        return Loss((model(batch) * 0).abs().sqrt().sum())

    with pytest.raises(FloatingPointError, match=r"first bad tensor: gradient of layer\.weight"):
        fit_line(tmp_path, steps=1, objective=root_at_zero)


def test_a_loss_that_is_not_finite_by_itself_is_named(tmp_path):
    def infinite(model, batch, step):
        return Loss(model(batch).sum() + torch.inf)

    with pytest.raises(FloatingPointError, match="first bad tensor: the loss itself"):
        fit_line(tmp_path, steps=1, objective=infinite)


def test_the_update_that_would_spoil_the_weights_is_not_made(tmp_path):
    model = Line()

    def infinite_at_two(model, batch, step):
        return Loss(model(batch).sum() * (torch.inf if step == 2 else 1.0))

    with pytest.raises(FloatingPointError, match="step 3"):
        fit_line(tmp_path, steps=5, objective=infinite_at_two, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert latest_checkpoint(tmp_path).name == "step-00000002"


# ---------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------


def one_step(clip: float | None) -> tuple[Line, Tensor]:
    torch.manual_seed(0)
    model = Line()
    optim = OptimizerConfig(lr=Schedule(0.1, 0.1), warmup_steps=0, weight_decay=0.0, max_grad_norm=clip)
    made = TrainState(model, build_optimizers(model, optim), EMA(model, EMAConfig()))
    _, norm = loop.train_step(made, torch.full((4, 1), 100.0), squared_error, optim, "fp32", 0)
    return model, norm


def test_the_gradients_norm_is_that_before_clipping():
    assert float(one_step(None)[1]) == pytest.approx(float(one_step(0.5)[1]))


def test_clipping_bounds_the_gradient_and_none_leaves_it():
    def norm(model):
        return float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())

    assert norm(one_step(0.5)[0]) == pytest.approx(0.5, rel=1e-4)
    assert norm(one_step(None)[0]) > 100


def test_the_step_size_follows_its_schedule(tmp_path):
    optimizer = OptimizerConfig(lr=Schedule(1.0, 0.0, 4, "linear"), warmup_steps=2)
    fit_line(tmp_path, steps=5, optimizer=optimizer)
    assert [line["lr"] for line in log_of(tmp_path)] == pytest.approx([0.5, 0.75, 0.5, 0.25, 0.0])


def test_training_lowers_the_loss(tmp_path):
    fit_line(tmp_path, steps=60, save_every=60)
    lines = log_of(tmp_path)
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]


def test_evaluation_sees_the_averaged_weights_in_eval_mode_and_training_goes_on_with_its_own(tmp_path):
    seen = []

    def evaluate(model, step):
        seen.append((model.training, torch.is_grad_enabled(), model.layer.weight.item()))
        return {"weight": model.layer.weight.item()}

    model, own = Line(), []

    def objective(model, batch, step):
        own.append((model.training, model.layer.weight.item()))
        return squared_error(model, batch, step)

    Trainer(
        model,
        objective,
        lambda step: torch.ones(4, 1),
        replace(CONFIG, eval_every=1, ema=EMAConfig(0.5, 1)),
        steps=3,
        seed=0,
        run_dir=tmp_path,
        meta={"kind": "line", "config": {}, "inputs": {}},
        evaluate=evaluate,
    ).train()
    weights = [weight for _, weight in own[1:]] + [model.layer.weight.item()]  # after updates 1, 2, 3
    assert [entry[:2] for entry in seen] == [(False, False)] * 3
    assert all(training for training, _ in own)
    assert seen[0][2] == pytest.approx(weights[0])
    assert seen[2][2] == pytest.approx((weights[2] * 4 + weights[1] * 2 + weights[0]) / 7)


def test_evaluation_uses_the_same_random_numbers_each_time_and_leaves_those_of_training_alone(tmp_path):
    trainer = Trainer(
        Line(),
        squared_error,
        lambda step: torch.ones(4, 1),
        CONFIG,
        run_dir=tmp_path,
        meta={"kind": "line"},
        steps=1,
    )
    trainer.state = fresh_state()
    trainer.evaluate, logged = (lambda model, step: {"noise": torch.rand(())}), []
    before = torch.get_rng_state()
    for _ in range(2):
        trainer._evaluate(SimpleNamespace(write=lambda step, numbers: logged.append(numbers)))
    assert logged[0] == logged[1]
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------


def test_opening_a_log_drops_what_came_after_the_checkpoint_and_a_broken_last_line(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo'
    )
    log = JSONLLogger(file, step=2)
    log.write(3, {"loss": 1.5})
    assert [(line["step"], line["loss"]) for line in read_log(file)] == [(1, 3.0), (2, 2.0), (3, 1.5)]


def test_opening_a_log_at_the_start_empties_it(tmp_path):
    """A run that died before its first checkpoint begins again."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    JSONLLogger(tmp_path / "log.jsonl", step=0)
    assert read_log(tmp_path / "log.jsonl") == []


# ---------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def broken(chain, tmp_path):
    """(folder of a dVAE's checkpoint, a function that rewrites its meta.json)."""
    shutil.copytree(chain / "dvae", tmp_path / "dvae")
    folder = latest_checkpoint(tmp_path / "dvae")

    def rewrite(**changes):
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | changes))
        write_checksums(folder)

    return folder, rewrite


def rewrite_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    write_checksums(folder)


NAME = "encoder.blocks.input.b"


class TestLoading:
    def test_another_kind(self, broken):
        with pytest.raises(ValueError, match="holds 'dvae', expected 'transformer'"):
            load_model(broken[0], "transformer")

    def test_a_newer_format_on_resuming(self, broken, start):
        broken[1](format=99)
        with pytest.raises(ValueError, match=r"has format 99"):
            start("dvae", broken[0].parents[1])

    @pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors"])
    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_a_truncated_file(self, broken, file, length):
        data = (broken[0] / file).read_bytes()
        (broken[0] / file).write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{file} is truncated or changed: its sha256"):
            load_model(broken[0], "dvae")
        write_checksums(broken[0])
        with pytest.raises(ValueError, match=rf"{file} is truncated or not a safetensors file"):
            load_model(broken[0], "dvae")

    @pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "meta.json"])
    def test_a_missing_file(self, broken, file):
        (broken[0] / file).unlink()
        with pytest.raises(ValueError, match=file):
            load_model(broken[0], "dvae")

    def test_a_missing_file_of_moments_on_resuming(self, broken, start):
        (broken[0] / "optimizer.safetensors").unlink()
        with pytest.raises(
            ValueError, match=r"no checkpoint .* is whole: .*optimizer\.safetensors cannot be read"
        ):
            start("dvae", broken[0].parents[1], steps=3)
        write_checksums(broken[0])
        with pytest.raises(ValueError, match=r"no file .*optimizer\.safetensors"):
            start("dvae", broken[0].parents[1], steps=3)

    def test_a_description_that_is_not_json(self, broken):
        (broken[0] / "meta.json").write_text("{half")
        with pytest.raises(ValueError, match=r"meta\.json is not JSON"):
            load_model(broken[0], "dvae")

    @pytest.mark.parametrize("text", ["[]", "3", '{"kind": "dvae"}'])
    def test_a_description_of_something_else(self, broken, text):
        (broken[0] / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=r"something unknown|has format None"):
            load_model(broken[0], "dvae")

    def test_a_wrong_shape(self, broken):
        rewrite_weights(broken[0], lambda weights: weights.update({NAME: torch.zeros(5)}))
        with pytest.raises(ValueError, match=rf"'{NAME}' is \(5,\), the model's is \(4,\)"):
            load_model(broken[0], "dvae", averaged=False)

    def test_a_renamed_tensor(self, broken):
        rewrite_weights(broken[0], lambda weights: weights.update({"bias": weights.pop(NAME)}))
        with pytest.raises(ValueError, match=f"lacks 1 tensors of the model, first '{NAME}'"):
            load_model(broken[0], "dvae", averaged=False)

    def test_a_tensor_too_many(self, broken):
        rewrite_weights(broken[0], lambda weights: weights.update({"extra": torch.zeros(1)}))
        with pytest.raises(ValueError, match="holds 1 tensors the model lacks, first 'extra'"):
            load_model(broken[0], "dvae")

    def test_a_configuration_with_an_unknown_key(self, broken):
        broken[1](model_config={"width": 3})
        with pytest.raises(ValueError, match=r"no key 'width'; did you mean 'widths'"):
            load_model(broken[0], "dvae")

    @pytest.mark.parametrize("place", ["nowhere", "dvae/log.jsonl"])
    def test_a_path_that_holds_no_run(self, broken, place):
        with pytest.raises(ValueError, match="expected a run or model directory"):
            load_model(broken[0].parents[2] / place, "dvae")

    def test_a_run_a_checkpoint_and_a_model_directory_hold_the_same(self, chain):
        paths = [chain / "dvae", latest_checkpoint(chain / "dvae"), chain / "model"]
        assert len({load_model(path, "dvae").hash for path in paths}) == 1

    def test_the_averaged_weights_are_taken_unless_the_raw_are_asked_for(self, whole):
        folder = latest_checkpoint(whole("dvae"))
        meta = json.loads((folder / "meta.json").read_text())["ema"]
        averages = bias_corrected(load_file(folder / "ema.safetensors"), meta["decay"], meta["updates"])
        raw = load_file(folder / "model.safetensors")
        for averaged, expected, other in ((True, averages, raw), (False, raw, averages)):
            found = load_model(whole("dvae"), "dvae", averaged=averaged).model.state_dict()
            assert torch.equal(found[NAME], expected[NAME])
            assert not torch.equal(found[NAME], other[NAME])

    def test_a_loaded_model_is_ready_to_use(self, chain):
        model = load_model(chain / "dvae", "dvae").model
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())

    def test_nothing_is_unpickled(self, chain, start, tmp_path, monkeypatch):
        """Neither on loading nor on resuming: a checkpoint cannot run code."""
        shutil.copytree(chain / "transformer", tmp_path / "run")

        def refuse(*args, **kwargs):
            raise AssertionError("something was unpickled")

        for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
            monkeypatch.setattr(owner, name, refuse)
        for kind in STAGES:
            load_model(chain / kind, kind)
        DALLE.from_pretrained(chain / "model")
        start("transformer", tmp_path / "run", steps=3)

    def test_nothing_is_pickled(self, chain):
        """Every file is JSON, text, an image, safetensors, or numpy without objects."""
        allowed = {
            ".json",
            ".jsonl",
            ".md",
            ".safetensors",
            ".png",
            ".npy",
            "",
        }  # "": latest, SHA256SUMS, .lock
        assert {path.suffix for path in chain.rglob("*") if path.is_file()} <= allowed
