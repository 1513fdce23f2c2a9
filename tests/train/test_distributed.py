"""Several processes train as one does (dalle/train/distributed.py, section 2.5): ddp, fsdp and hsdp by gloo
on the CPU.

Each mode's processes are started once and train every family (tests/helpers/distributed_work.py); a run is
its checkpoint and log, which are compared with those of a single process. Sums over processes are rounded in
another order, and that is all that may differ.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.clip.objective import CLIPObjective
from dalle.commands.train_clip import TrainCLIPArgs
from dalle.dvae.losses import gumbel_softmax
from dalle.dvae.objective import DVAEObjective
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.runs.args import TrainArgs
from dalle.runs.training import start_processes
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.distributed import Distributed
from dalle.train.dtensor import clip_gradients, distribute_like, gradient_norm, local
from dalle.train.loggers import read_log
from dalle.train.sharded_checkpoint import read_whole
from dalle.train.step import mean_loss, split
from dalle.train.trainer import check_batch_size
from dalle.transformer.objective import TransformerObjective
from dalle.types import BatchShard, Loss
from tests.helpers.distributed_work import (
    BATCH,
    FACTORED,
    PLAIN,
    TRAIN,
    dvae,
    pair_batch,
    pixel_batch,
    token_batch,
    train,
)

PROJECT = Path(__file__).parents[2]
WORLD = {"ddp": 2, "fsdp": 2, "hsdp": 4}
MODES = ["ddp", "fsdp", pytest.param("hsdp", marks=pytest.mark.slow)]
FILES = ("model", "ema", "optimizer")
TOLERANCE = {"transformer": 1e-6, "dvae": 1e-6, "clip": 5e-6, "fp16": 2e-4, "bf16": 2e-3}
"""Largest difference of any weight, average or moment after three steps of 1e-2."""


def processes(words: list[str], world: int, cwd: Path) -> list[subprocess.CompletedProcess]:
    """The same command as each of `world` processes, under the variables that torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    shared |= {"LOCAL_WORLD_SIZE": str(world), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=400) for process in started]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *out)
        for p, out in zip(started, outputs, strict=True)
    ]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Run directories of one process, by case."""
    out = tmp_path_factory.mktemp("single")
    for name, case in PLAIN.items():
        train(case, Distributed(), out / name)
    return out


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """several(mode): run directories of that mode, by case, and what each process printed."""
    made: dict[str, tuple[Path, list[str]]] = {}

    def start(mode: str) -> tuple[Path, list[str]]:
        if mode not in made:
            out = tmp_path_factory.mktemp(mode)
            words = [
                str(PROJECT / "tests" / "helpers" / "distributed_work.py"),
                mode,
                str(out),
                *(["2"] if mode == "hsdp" else []),
            ]
            done = processes(words, WORLD[mode], out)
            assert [p.returncode for p in done] == [0] * WORLD[mode], done[0].stderr + done[-1].stderr
            made[mode] = out, [p.stdout for p in done]
        return made[mode]

    return start


def tensors(run: Path, files: tuple[str, ...] = FILES) -> dict[str, Tensor]:
    """Weights, running sums and moments of a run's last checkpoint."""
    folder = latest_checkpoint(run)
    return {f"{file}/{name}": tensor for file in files for name, tensor in read_whole(folder, file).items()}


def assert_close_runs(one: Path, other: Path, tolerance: float) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    worst = max(a, key=lambda name: (a[name] - b[name]).abs().max())
    torch.testing.assert_close(
        b[worst], a[worst], rtol=0, atol=tolerance, msg=lambda text: f"{worst}: {text}"
    )
    for line, twin in zip(read_log(one / "log.jsonl"), read_log(other / "log.jsonl"), strict=True):
        for clock in ("step_time", "data_time_frac", "max_memory_gib", "samples_per_sec", "tokens_per_sec"):
            line.pop(clock, None), twin.pop(clock, None)
        assert twin.keys() == line.keys()
        for name, value in line.items():
            assert twin[name] == pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance, nan_ok=True), (
                name
            )


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_train_as_one(mode, case, single, several):
    """Weights, averages, moments, losses, norms, scales; several also stop, activation_checkpointing and take
    several passes."""
    assert_close_runs(single / case, several(mode)[0] / case, TOLERANCE[case])


@pytest.mark.parametrize("case", PLAIN)
def test_slices_train_as_copies(case, several):
    assert_close_runs(several("ddp")[0] / case, several("fsdp")[0] / case, TOLERANCE[case])


def test_the_tests_above_could_fail(single):
    """The weights move by far more than the tolerance."""
    for name, case in PLAIN.items():
        torch.manual_seed(0)
        trained = read_whole(latest_checkpoint(single / name), "model")
        moved = [(trained[key] - tensor).abs().max() for key, tensor in case.model().state_dict().items()]
        assert max(moved) > 5 * TOLERANCE[name]


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_anywhere_lowers_the_scales_everywhere(mode, single, several):
    lines = [line for line in read_log(several(mode)[0] / "fp16" / "log.jsonl") if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert min(lines[1]["grad_scale_log2"]) < 13 < max(lines[0]["grad_scale_log2"])


@pytest.mark.parametrize("mode", MODES)
def test_one_process_writes_and_prints(mode, single, several):
    out, printed = several(mode)
    assert "printed by process 0" in printed[0]
    assert "resuming from step 2" in printed[0]
    assert printed[1:] == [""] * (WORLD[mode] - 1)
    for name in PLAIN:
        assert {p.name for p in (out / name).iterdir()} == {p.name for p in (single / name).iterdir()}


@pytest.mark.parametrize("mode", MODES)
def test_what_processes_say_to_each_other(mode, several):
    world = WORLD[mode]
    total = world * (world + 1) / 2
    for rank in range(world):
        said = json.loads((several(mode)[0] / f"words-{rank}.json").read_text())
        assert said["sum"] == total
        assert said["mean"] == (world - 1) / 2
        assert said["true"] == [True, False]
        assert said["gathered"] == [float(r) for r in range(world) for _ in range(2)]
        assert said["gradient"] == [total] * 2  # each process r weighs all rows by r + 1
        assert said["main"] == (rank == 0)
        assert said["cuts"] == (
            [0, 1] if mode != "ddp" else []
        )  # by outputs, but the second of the MLP by inputs (E.2)
        assert said["mesh"] == {"ddp": {}, "fsdp": {"shard": 2}, "hsdp": {"replicate": 2, "shard": 2}}[mode]
        held = {"ddp": 1, "fsdp": 2, "hsdp": 2}[mode]
        assert said["held"] == pytest.approx(said["parameters"] / held, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_replicas_that_average_by_factors_stay_alike_and_learn(mode, several):
    """fsdp has no replicas: nothing is factored."""
    out = several(mode)[0]
    losses = [line["loss"] for line in read_log(out / "factored" / "log.jsonl") if "loss" in line]
    assert all(after < before for before, after in pairwise(losses))
    for name in FACTORED:
        held = [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(WORLD[mode])]
        assert {"ddp": held[0] == held[1], "fsdp": held[0] != held[1], "hsdp": held[:2] == held[2:]}[mode]
        sent = [line["comm_ratio"] for line in read_log(out / name / "log.jsonl") if "comm_ratio" in line]
        assert bool(sent) == (mode != "fsdp")
        assert all((share < 0.7) == (name != "whole") for share in sent)


@pytest.mark.parametrize("mode", MODES)
def test_going_on_changes_no_bit_of_what_a_run_remembers(mode, several):
    """Weights, averages, moments, scales, errors of PowerSGD; counts of skipped updates and of halvings."""
    runs = [several(mode)[0] / name for name in ("factored", "resumed")]
    a, b = (tensors(run, (*FILES, "scales", *(["powersgd"] if mode != "fsdp" else []))) for run in runs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(tensor.any() for name, tensor in a.items() if name.startswith("powersgd/"))
    numbers, twins = (read_json(latest_checkpoint(run) / "meta.json") for run in runs)
    assert numbers["extras"] == twins["extras"]
    assert numbers["extras"]["plateau"]["reductions"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_too_high_to_save_anything_trains_as_without(mode, single, several):
    a, b = tensors(single / "transformer"), tensors(several(mode)[0] / "whole")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=TOLERANCE["transformer"])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_bad_in_one_process_is_skipped_and_named_by_all(mode, several):
    out = several(mode)[0]
    said = [json.loads((out / f"failures-{rank}.json").read_text()) for rank in range(WORLD[mode])]
    assert all(words == said[0] for words in said)
    assert "step 5: loss nan" in said[0]["spoilt"]
    assert "first bad tensor: gradient of " in said[0]["spoilt"]
    assert "first bad tensor: parameter to_logits.weight." in said[0]["half_bad"]
    assert [
        line["skipped_steps"] for line in read_log(out / "spoilt" / "log.jsonl") if "skipped_steps" in line
    ] == [
        0,
        1,
        1,
        2,
    ]


@pytest.mark.slow
def test_a_process_that_hangs_is_named(tmp_path):
    (tmp_path / "hang.py").write_text(HANG)
    first, _ = processes([str(tmp_path / "hang.py")], 2, tmp_path)
    assert first.returncode != 0
    assert "A process hangs or has ended: [Rank 0]: Ranks 1 failed" in first.stderr


HANG = """
import time
from datetime import timedelta
import torch
from dalle.train import distributed as parallel
parallel.ANSWER = timedelta(seconds=3)
with parallel.Distributed.start("ddp", "cpu", timeout=timedelta(seconds=5)) as several:
    several.all_sum(torch.ones(1))
    if several.rank == 1:
        time.sleep(15)
    several.all_sum(torch.ones(1))
"""


# ---------------------------------------------------------------------------------------------
# Parts of a batch, without processes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["transformer", "dvae", "fp16"])
@pytest.mark.parametrize("passes", [2, 8])
def test_accumulating_changes_no_result(case, passes, single, tmp_path):
    own = PLAIN[case]
    train(replace(own, train=own.train | {"grad_accum_steps": passes}), Distributed(), tmp_path)
    a, b = tensors(single / case), tensors(tmp_path)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=TOLERANCE[case])
    lines = [
        [line for line in read_log(run / "log.jsonl") if "loss" in line] for run in (single / case, tmp_path)
    ]
    for line, twin in zip(*lines, strict=True):
        assert twin.keys() == line.keys()  # a norm that is not finite is left out
        for name in {"loss", "grad_norm"} & line.keys():
            assert twin[name] == pytest.approx(line[name], rel=1e-3 if case == "fp16" else 1e-5)


def test_the_mean_over_parts_is_the_batchs():
    """Text tokens are not spread evenly: a mean of means would be another number."""
    torch.manual_seed(0)
    model, objective, batch = PLAIN["transformer"].model(), TransformerObjective(), token_batch(0)
    torch.nn.init.normal_(model.to_logits.weight)
    parts = split(batch, 4)
    counts = [objective.num_targets(model, part) for part in parts]
    assert len({int(count) for count in counts}) > 1
    losses = [objective(model, part, 0, BatchShard(i, 4, sum(counts))) for i, part in enumerate(parts)]
    together, expected = mean_loss(losses, Distributed()), objective(model, batch, 0)
    torch.testing.assert_close(together.total, expected.total.detach())
    for name, value in expected.metrics.items():
        torch.testing.assert_close(together.metrics[name], value)
    naive = torch.stack([objective(model, part, 0).total for part in parts]).mean()
    assert abs(float((naive - expected.total).detach())) > 1e-3


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_noise_of_a_image_is_that_of_its_place(count):
    """Whatever the parts, and whatever the strides of the logits."""
    logits = torch.randn(8, 5, 3, 4)
    torch.manual_seed(1)
    expected = gumbel_softmax(logits, 0.7)
    torch.manual_seed(1)
    strided = gumbel_softmax(logits.to(memory_format=torch.channels_last), 0.7)
    torch.testing.assert_close(strided, expected)
    found = []
    for i, part in enumerate(logits.chunk(count)):
        torch.manual_seed(1)
        found.append(gumbel_softmax(part, 0.7, first=i * len(part)))
    torch.testing.assert_close(torch.cat(found), expected)
    torch.manual_seed(2)
    assert not torch.equal(gumbel_softmax(logits, 0.7), expected)


def test_the_use_of_the_codes_is_that_of_all_processes():
    """Two processes whose tokens a third adds up: as if the batch were twice as large."""
    torch.manual_seed(0)
    model, objective = dvae(), DVAEObjective()
    part = BatchShard(0, 2, None, sum=lambda counts: 2 * counts, gather=lambda rows: rows)
    whole_batch, shared = objective(model, pixel_batch(0), 0), objective(model, pixel_batch(0), 0, part)
    assert shared.metrics["perplexity"] == pytest.approx(float(whole_batch.metrics["perplexity"]))


def test_clips_loss_is_open_clips(single):
    """Of one process; those of several are compared with it above."""
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    model = PLAIN["clip"].model()
    pixels, packed, _ = pair_batch(0)
    found = CLIPObjective()(model, (pixels, packed), 0).total
    expected = ClipLoss()(model.encode_image(pixels), model.encode_text(packed), model.logit_scale())
    torch.testing.assert_close(found, expected)


def test_splitting_keeps_tuples_and_dicts():
    a, b = torch.arange(4), torch.arange(8).view(4, 2)
    first, second = split({"a": (a, b)}, 2)
    assert first["a"][0].tolist() == [0, 1]
    assert second["a"][1].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="4 samples do not divide among 3 passes"):
        split((a, b), 3)


def test_metrics_that_are_numbers_are_averaged_too():
    loss = mean_loss([Loss(torch.tensor(1.0), {"tau": 0.5, "n": torch.tensor(2)})] * 2, Distributed())
    assert float(loss.total) == 1
    assert float(loss.metrics["tau"]) == 0.5
    assert float(loss.metrics["n"]) == 2


def test_gradients_of_plain_tensors_are_clipped_as_torch_does():
    weights = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    for weight, size in zip(weights[:2], (3.0, 4.0), strict=True):
        weight.grad = torch.tensor([size, 0, 0])
    norm = gradient_norm(weights)
    assert float(norm) == 5
    clip_gradients(weights, norm, 1.0)
    assert weights[1].grad.tolist() == pytest.approx([0.8, 0, 0])
    assert local(weights[0]) is distribute_like(weights[0], weights[1]) is weights[0]


# ---------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(world, local_world, local_rank): its variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def pretend(world: int, local_world: int | None = None, local_rank: int = 0) -> None:
        values = {
            "RANK": 0,
            "WORLD_SIZE": world,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": local_world or world,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return pretend


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hsdp"])
def test_a_parallel_mode_without_torchrun_is_refused_with_the_command(mode, torchrun):
    with pytest.raises(ValueError, match=f"--parallel {mode} needs torchrun.*torchrun --nproc-per-node 2"):
        start_processes(TrainArgs(parallel=mode))


@pytest.mark.parametrize("mode", ["fsdp", "hsdp"])
def test_compiled_slices_are_refused(mode, torchrun):
    torchrun(2)
    with pytest.raises(ValueError, match=f"--compile with --parallel {mode} is untested"):
        start_processes(TrainArgs(parallel=mode, compile=True))


def test_no_patience_is_refused():
    with pytest.raises(ValueError, match="dist_timeout_minutes must be positive"):
        TrainArgs(dist_timeout_minutes=0)


def test_torchrun_without_a_parallel_mode_is_refused(torchrun):
    torchrun(2)
    with pytest.raises(ValueError, match=r"torchrun started 2 processes.* add --parallel ddp, fsdp or hsdp"):
        start_processes(TrainArgs())


def test_one_process_of_torchrun_may_train_alone(torchrun):
    torchrun(1)
    with start_processes(TrainArgs(device="cpu")) as parallel:
        assert (parallel.world_size, parallel.is_main, parallel.mesh) == (1, True, None)


@pytest.mark.parametrize(("world", "local_world", "shard"), [(6, 4, None), (4, 4, 3), (4, 4, 0)])
def test_hsdp_needs_groups_of_one_size(world, local_world, shard, torchrun):
    torchrun(world, local_world)
    size = local_world if shard is None else shard
    with pytest.raises(ValueError, match=f"{world} processes do not divide into groups of {size}.*--shard"):
        start_processes(TrainArgs(parallel="hsdp", shard=shard))


def test_shard_is_for_hsdp(torchrun):
    torchrun(2)
    with pytest.raises(ValueError, match="shard is for --parallel hsdp, not for fsdp"):
        start_processes(TrainArgs(parallel="fsdp", shard=2))


@pytest.mark.parametrize(
    ("found", "name", "said"),
    [
        (1, "auto", "process 1 of this machine has no GPU"),
        (2, "cuda:0", "cannot be shared among processes"),
    ],
)
def test_each_process_needs_a_gpu_of_its_own(found, name, said, torchrun, monkeypatch):
    torchrun(2, local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=said):
        start_processes(TrainArgs(parallel="ddp", device=name))


class Sixfold(Distributed):
    """Six processes, in name."""

    def __init__(self, mode: str = "ddp"):
        super().__init__()
        self.mode, self.world_size = mode, 6


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=f"train.batch_size {BATCH} does not divide among 6 processes and 1 passes"
    ):
        check_batch_size(TRAIN, Sixfold())
    check_batch_size(replace(TRAIN, batch_size=12, grad_accum_steps=2), Sixfold())
    with pytest.raises(ValueError, match="make it a multiple of 24"):
        check_batch_size(replace(TRAIN, batch_size=12, grad_accum_steps=4), Sixfold())


def test_muon_is_refused_where_matrices_are_sliced():
    muon = replace(TRAIN, batch_size=6, optimizer=replace(TRAIN.optimizer, muon_lr_scale=5.0))
    check_batch_size(muon, Sixfold("ddp"))
    with pytest.raises(ValueError, match="Muon needs whole matrices, and --parallel fsdp shards them"):
        check_batch_size(muon, Sixfold("fsdp"))


def test_clip_refuses_to_accumulate():
    with pytest.raises(ValueError, match="grad_accum_steps changes CLIP's loss"):
        TrainCLIPArgs(train=replace(TRAIN, grad_accum_steps=2))


def test_what_only_shares_the_work_may_change_when_a_run_goes_on(tiny_runs):
    run = tiny_runs.transformer
    other = replace(run, parallel="hsdp", shard=2, train=replace(run.train, grad_accum_steps=2))
    assert other.record() == run.record()


# ---------------------------------------------------------------------------------------------
# torchrun
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_torchrun_trains_what_one_process_loads_and_goes_on_with(mode, chain, tiny_configs, tmp_path, python):
    script = ["scripts/train_transformer.py", "--config", tiny_configs / "transformer" / "shapes.yaml"]
    script += ["--tokens", chain / "tokens", "--text-tokenizer", chain / "text", "--out", tmp_path / "run"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python([*launcher, *script, "--parallel", mode], cwd=tmp_path, seconds=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("taking tokens from") == 1
    found, alone = (
        load_model(run, "transformer").model.state_dict() for run in (tmp_path / "run", chain / "transformer")
    )
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)
    done = python([*script, "--steps", "3"], cwd=tmp_path, seconds=400)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 2" in done.stdout
