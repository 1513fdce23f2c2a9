"""Training in several processes equals training in one (section 2.5): ddp, fsdp and hsdp over gloo.

The processes of each mode start once and train every family (tests/helpers/distributed_work.py); checkpoints
and logs are compared with those of a single process. Only the order of sums may differ.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from dalle.clip.objective import CLIPObjective
from dalle.dvae.losses import gumbel_softmax
from dalle.dvae.objective import DVAEObjective
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.runs.training import start_processes
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.config import TrainArgs
from dalle.train.distributed import Distributed
from dalle.train.fsdp import shard_model
from dalle.train.loggers import read_log
from dalle.train.sharded_checkpoint import read_whole
from dalle.train.step import mean_loss, split
from dalle.train.trainer import check_batch_size
from dalle.transformer.objective import TransformerObjective
from dalle.types import BatchShard
from tests.helpers import distributed_work as cases
from tests.helpers.line import log_lines
from tests.helpers.processes import run_processes

WORLD = {"ddp": 2, "fsdp": 2, "hsdp": 4}
MODES = ["ddp", "fsdp", pytest.param("hsdp", marks=pytest.mark.slow)]
FILES = ("model", "ema", "optimizer")
MUON = replace(cases.TRAIN.optimizer, muon_lr_scale=5.0)
TOLERANCE = {
    "transformer": 1e-6,
    "dvae": 1e-6,
    "dvae_fp16": 1e-3,
    "clip": 5e-6,
    "diffusion": 5e-6,
    "fp16": 2e-4,
    "bf16": 2e-3,
}
"""Largest difference of any weight, average or moment after three steps of 1e-2."""


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """Run directories of one process, by case."""
    out = tmp_path_factory.mktemp("single")
    for name, case in cases.PLAIN.items():
        cases.train(case, Distributed(), out / name)
    return out


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """several(mode): run directories of that mode, by case, and what each process found."""

    @cache
    def start(mode: str) -> tuple[Path, list[dict[str, Any]]]:
        out = tmp_path_factory.mktemp(mode)
        shard = 2 if mode == "hsdp" else None
        return out, run_processes(WORLD[mode], cases.work, mode, out, shard, seconds=300)

    return start


def tensors(run: Path, files: tuple[str, ...] = FILES) -> dict[str, Tensor]:
    """Weights, running sums and moments of a run's last checkpoint."""
    folder = latest_checkpoint(run)
    return {f"{file}/{name}": tensor for file in files for name, tensor in read_whole(folder, file).items()}


def assert_close_runs(one: Path, other: Path, tolerance: float) -> None:
    torch.testing.assert_close(tensors(other), tensors(one), rtol=0, atol=tolerance)
    for evaluations in (False, True):
        for line, twin in zip(log_lines(one, evaluations), log_lines(other, evaluations), strict=True):
            assert twin.keys() == line.keys()
            for name, value in line.items():
                expected = pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance, nan_ok=True)
                assert twin[name] == expected, name


@pytest.mark.parametrize("case", cases.PLAIN)
@pytest.mark.parametrize("mode", MODES)
def test_several_processes_train_as_one(mode, case, single, several):
    """Weights, averages, moments, losses, norms, scales; several also stop, recompute and take passes."""
    assert_close_runs(single / case, several(mode)[0] / case, TOLERANCE[case])


def test_the_tests_above_could_fail(single):
    """The weights move by far more than the tolerance."""
    for name, case in cases.PLAIN.items():
        torch.manual_seed(0)
        trained = read_whole(latest_checkpoint(single / name), "model")
        moved = [(trained[key] - tensor).abs().max() for key, tensor in case.model().state_dict().items()]
        assert max(moved) > 5 * TOLERANCE[name]


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_anywhere_lowers_the_scales_everywhere(mode, single, several):
    lines = log_lines(several(mode)[0] / "fp16")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert min(lines[1]["grad_scale_log2"]) < 13 < max(lines[0]["grad_scale_log2"])


@pytest.mark.parametrize("mode", MODES)
def test_one_process_writes_and_prints(mode, single, several):
    out, found = several(mode)
    printed = [process["printed"] for process in found]
    assert "printed by process 0" in printed[0]
    assert "resuming from step 2" in printed[0]
    assert printed[1:] == [""] * (WORLD[mode] - 1)
    for name in cases.PLAIN:
        assert {p.name for p in (out / name).iterdir()} == {p.name for p in (single / name).iterdir()}


@pytest.mark.parametrize("mode", MODES[1:])
def test_sharded_models_start_in_the_memory_of_their_slices(mode, several):
    """Also from a checkpoint or a smaller model; a single process's first values, bit for bit."""
    for process in several(mode)[1]:
        assert (process["start"], process["init_from"]) == ("", "")


@pytest.mark.slow
def test_compiled_layers_of_sharded_models_train_as_others(tmp_path):
    run_processes(2, cases.compiled, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_collectives_and_shards(mode, several):
    assert [process["collectives"] for process in several(mode)[1]] == [""] * WORLD[mode]


@pytest.mark.parametrize("mode", MODES)
def test_replicas_that_average_by_factors_stay_alike_and_learn(mode, several):
    """fsdp has no replicas: nothing is factored."""
    out, found = several(mode)
    losses = [line["loss"] for line in log_lines(out / "factored")]
    assert all(after < before for before, after in pairwise(losses))
    for name in cases.FACTORED:
        weights = [process["weights"][name] for process in found]
        if mode != "fsdp":
            replica = weights[1 if mode == "ddp" else 2]
            assert torch.equal(weights[0], replica)
        sent = [line["comm_ratio"] for line in read_log(out / name / "log.jsonl") if "comm_ratio" in line]
        assert bool(sent) == (mode != "fsdp")
        assert all((share < 0.7) == (name != "whole") for share in sent)


@pytest.mark.parametrize("mode", MODES)
def test_going_on_changes_no_bit_of_what_a_run_remembers(mode, several):
    """Weights, averages, moments, scales, errors of PowerSGD; counts of skipped updates and of halvings."""
    runs = [several(mode)[0] / name for name in ("factored", "resumed")]
    a, b = (tensors(run, (*FILES, "scales", *(["powersgd"] if mode != "fsdp" else []))) for run in runs)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert all(tensor.any() for name, tensor in a.items() if name.startswith("powersgd/"))
    numbers, twins = (read_json(latest_checkpoint(run) / "meta.json") for run in runs)
    assert numbers["extras"] == twins["extras"]
    assert numbers["extras"]["plateau"]["reductions"] == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_rank_too_high_to_save_anything_trains_as_without(mode, single, several):
    a, b = tensors(single / "transformer"), tensors(several(mode)[0] / "whole")
    torch.testing.assert_close(b, a, rtol=0, atol=TOLERANCE["transformer"])


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_bad_in_one_process_is_skipped_and_named_by_all(mode, several):
    out, found = several(mode)
    for name in cases.BROKEN:
        assert len({process[name] for process in found}) == 1
    assert "step 5: loss nan" in found[0]["spoilt"]
    assert "first bad tensor: gradient of " in found[0]["spoilt"]
    assert "first bad tensor: parameter to_logits.weight." in found[0]["half_bad"]
    lines = read_log(out / "spoilt" / "log.jsonl")
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [0, 1, 1, 2]


def test_a_process_that_hangs_is_named():
    first, _ = run_processes(2, cases.hang)
    assert "A process hangs or has ended" in first
    assert "Ranks 1 failed" in first


@pytest.mark.parametrize("case", ["transformer", "dvae", "fp16"])
@pytest.mark.parametrize("passes", [2, 8])
def test_accumulating_changes_no_result(case, passes, single, tmp_path):
    own = cases.PLAIN[case]
    cases.train(replace(own, train=own.train | {"grad_accum_steps": passes}), Distributed(), tmp_path)
    torch.testing.assert_close(tensors(tmp_path), tensors(single / case), rtol=0, atol=TOLERANCE[case])
    for line, twin in zip(log_lines(single / case), log_lines(tmp_path), strict=True):
        assert twin.keys() == line.keys()  # a norm that is not finite is left out
        for name in {"loss", "grad_norm"} & line.keys():
            assert twin[name] == pytest.approx(line[name], rel=1e-3 if case == "fp16" else 1e-5)


def test_the_mean_over_parts_is_the_batchs():
    """Text tokens are not spread evenly: a mean of means would be another number."""
    torch.manual_seed(0)
    model, objective, batch = cases.transformer()(), TransformerObjective(), cases.token_batch(0)
    torch.nn.init.normal_(model.to_logits.weight)
    parts = split(batch, 4)
    counts = [objective.num_targets(model, part) for part in parts]
    assert len({int(count) for count in counts}) > 1
    losses = [objective(model, part, 0, BatchShard(i, 4, sum(counts))) for i, part in enumerate(parts)]
    together, expected = mean_loss(losses, Distributed()), objective(model, batch, 0)
    torch.testing.assert_close(together.total, expected.total.detach())
    torch.testing.assert_close(together.metrics, expected.metrics)
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
    model, objective, pixels = cases.dvae(), DVAEObjective(), cases.pixel_batch(0)
    part = BatchShard(0, 2, None, sum=lambda counts: 2 * counts)
    whole_batch, shared = objective(model, pixels, 0), objective(model, pixels, 0, part)
    assert shared.metrics["perplexity"] == pytest.approx(float(whole_batch.metrics["perplexity"]))


def test_scalars_move_to_the_device_of_the_shards(monkeypatch):
    """FSDP2 leaves those that it is to ignore where they were made; meta stands for a GPU."""
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **_: module)
    model, scalar = torch.nn.Linear(1, 1), Mock(data=torch.zeros(()))
    model.fsdp_groups = list
    shard_model(model, SimpleNamespace(device_type="meta"), "fp32", [scalar], by_longer_side=False)
    assert scalar.data.is_meta


def test_clips_loss_is_open_clips(single):
    """Of one process; those of several are compared with it above."""
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    model = cases.PLAIN["clip"].model()
    pixels, packed, _ = cases.pair_batch(0)
    found = CLIPObjective()(model, (pixels, packed), 0).total
    expected = ClipLoss()(model.encode_image(pixels), model.encode_text(packed), model.logit_scale())
    torch.testing.assert_close(found, expected)


def test_a_batch_that_does_not_divide_among_passes_is_refused():
    with pytest.raises(ValueError, match="4 samples do not divide among 3 passes"):
        split((torch.zeros(4),), 3)


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun(world, local_world, local_rank) sets its variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)

    def pretend(world: int, local_world: int | None = None, local_rank: int = 0) -> None:
        for name, value in zip(names, (0, world, local_rank, local_world or world), strict=True):
            monkeypatch.setenv(name, str(value))

    return pretend


@pytest.mark.parametrize(
    ("world", "local_world", "args", "words"),
    [
        (None, None, {"parallel": "ddp"}, "--parallel ddp needs torchrun"),
        (2, 2, {}, "torchrun started 2 processes.*--parallel ddp, fsdp or hsdp"),
        (6, 4, {"parallel": "hsdp"}, "6 processes do not divide into groups of 4.*--shard"),
        (4, 4, {"parallel": "hsdp", "shard": 0}, "4 processes do not divide into groups of 0"),
        (2, 2, {"parallel": "fsdp", "shard": 2}, "--shard is for --parallel hsdp"),
    ],
)
def test_a_mode_that_does_not_match_the_launch_is_refused(world, local_world, args, words, torchrun):
    if world:
        torchrun(world, local_world)
    with pytest.raises(ValueError, match=words):
        start_processes(TrainArgs(**args))


def test_one_process_of_torchrun_may_train_alone(torchrun):
    torchrun(1)
    with start_processes(TrainArgs(device="cpu")) as parallel:
        assert (parallel.world_size, parallel.is_main, parallel.mesh) == (1, True, None)


@pytest.mark.parametrize(
    ("found", "name", "said"),
    [(1, "auto", "process 1 of this machine has no GPU"), (2, "cuda:0", "cannot be shared among processes")],
)
def test_each_process_needs_a_gpu_of_its_own(found, name, said, torchrun, monkeypatch):
    torchrun(2, local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    with pytest.raises(ValueError, match=said):
        start_processes(TrainArgs(parallel="ddp", device=name))


@pytest.mark.parametrize(
    ("mode", "changes", "words"),
    [
        ("ddp", {}, f"batch_size {cases.BATCH} does not divide among 6 processes and 1 passes"),
        ("ddp", {"batch_size": 12, "grad_accum_steps": 2}, None),
        ("ddp", {"batch_size": 12, "grad_accum_steps": 4}, "make it a multiple of 24"),
        ("ddp", {"batch_size": 6, "optimizer": MUON}, None),
        ("fsdp", {"batch_size": 6, "optimizer": MUON}, "Muon needs whole matrices"),
    ],
)
def test_batches_that_do_not_divide_and_muon_with_shards_are_refused(mode, changes, words):
    dist = SimpleNamespace(mode=mode, world_size=6, sharded=mode == "fsdp")
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_batch_size(replace(cases.TRAIN, **changes), dist)


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


def test_gradients_of_ddp_are_views_of_its_buckets():
    """Of one bucket here: no copy of each gradient besides."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        dist, model = Distributed(mode="ddp"), torch.nn.Linear(3, 2)
        dist.wrap(model, "fp32")
        dist.forward(model, lambda model: model(torch.ones(1, 3)).sum()).backward()
        weight, bias = (p.grad.untyped_storage().data_ptr() for p in model.parameters())
        assert weight == bias
    finally:
        torch.distributed.destroy_process_group()
