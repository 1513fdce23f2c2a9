"""Small trainings of every family, by one process and by several."""

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dalle.clip import CLIP, CLIPConfig
from dalle.clip.objective import CLIPObjective
from dalle.compile import compile_layers
from dalle.dvae import DVAE, DVAEConfig, DVAELossConfig
from dalle.dvae.objective import DVAEObjective
from dalle.hub.init_from import load_pretrained_weights
from dalle.planner.count import LiveBytes
from dalle.schedules import Schedule
from dalle.train import TrainConfig, Trainer, distributed
from dalle.train.checkpoint import latest_checkpoint, restore
from dalle.train.config import EMAConfig, OptimizerConfig, PlateauConfig, PowerSGDConfig
from dalle.train.distributed import Distributed, local
from dalle.train.state import TrainState
from dalle.train.step import split, to_device
from dalle.train.trainer import init_train_state
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.objective import TransformerObjective
from dalle.types import FULL_BATCH, BatchShard, Loss
from dalle.unet import DiffusionConfig, UNet, UNetConfig
from dalle.unet.objective import DiffusionObjective
from tests.helpers.processes import traceback_of

BATCH, STEPS = 8, 3
TRAIN = TrainConfig(
    batch_size=BATCH,
    # eps: a gradient that is 0 but for rounding must not become a step of full size
    optimizer=OptimizerConfig(lr=Schedule(1e-2, 1e-2), warmup_steps=0, max_grad_norm=0.5, eps=1e-4),
    ema=EMAConfig(decay=0.9, update_every=1),
    precision="fp32",
    log_every=1,
    eval_every=2,
    save_every=STEPS,
    keep_last=10,
)
DVAE_CONFIG = DVAEConfig(widths=(8, 8), blocks_per_group=1, downsample_factor=2, vocab_size=6, codebook_dim=5)
TRANSFORMER_CONFIG = TransformerConfig(3, 2, 8, 5, (3, 3), 11, 8, conv_kernel=3, init_scale=1.0)
UNET_CONFIG = UNetConfig(
    image_size=8,
    width=32,
    channel_mult=(1, 2),
    blocks=1,
    attention=(4,),
    head_width=16,
    dropout=0.0,
    text_len=5,
    text_vocab=11,
    text_width=16,
    text_layers=1,
    text_heads=2,
    inpainting=True,
    diffusion=DiffusionConfig(steps=50),
)
CLIP_CONFIG = CLIPConfig(8, 16, 8, 16, 2, "class", 6, 20, 16, 2, 8)


def token_batch(step: int) -> Tensor:
    """Joint ids with captions of many lengths, so that parts differ in their number of text tokens."""
    rng = torch.Generator().manual_seed(step)
    layout = TRANSFORMER_CONFIG.layout
    lengths = torch.randint(5, (BATCH,), generator=rng).tolist()
    captions = [torch.randint(11, (n,), generator=rng).tolist() for n in lengths]
    return layout.pack(layout.pad_text(captions), torch.randint(8, (BATCH, 9), generator=rng))


def pixel_batch(step: int, side: int = 8) -> Tensor:
    return torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(step))


def pair_batch(step: int) -> tuple[Tensor, ...]:
    """Images, captions, and images that no caption describes."""
    rng = torch.Generator().manual_seed(step)
    return pixel_batch(step, 16), torch.randint(20, (BATCH, 6), generator=rng), pixel_batch(step + 100, 16)


def diffusion_batch(step: int) -> dict[str, Tensor]:
    """Images, captions of pads and ids, and masks."""
    rng = torch.Generator().manual_seed(step)
    mask = torch.randint(2, (BATCH, 1, 8, 8), generator=rng).float()
    return {"pixels": pixel_batch(step), "text": torch.randint(14, (BATCH, 5), generator=rng), "mask": mask}


def unet() -> nn.Module:
    """With outputs, and attention to the captions, that are not 0 from the start."""
    model = UNet(UNET_CONFIG)
    for name, parameter in model.named_parameters():
        if name == "out.2.weight" or name.endswith(("out_layers.3.weight", "proj_out.weight")):
            nn.init.normal_(parameter, std=0.05)
    return model.to(memory_format=torch.channels_last)


def loud(step: int, part: BatchShard) -> float:
    """The second step's loss is so large that fp16 overflows."""
    return 1e9 if step == 1 else 1.0


def nan_in_last(step: int, part: BatchShard) -> float:
    """NaN in the last process alone, in the second step and from the fourth on."""
    return float("nan") if step in (1, 3, 4) and part.index == part.count - 1 else 1.0


@dataclass(frozen=True)
class Scaled:
    """The transformer's loss times a factor of step and part."""

    factor: Callable[[int, BatchShard], float]
    inner: TransformerObjective = TransformerObjective()

    def num_targets(self, model: Transformer, batch: Tensor) -> Tensor:
        return self.inner.num_targets(model, batch)

    def __call__(self, model: Transformer, batch: Tensor, step: int, part: BatchShard = FULL_BATCH) -> Loss:
        loss = self.inner(model, batch, step, part)
        return Loss(loss.total * self.factor(step, part), loss.metrics)


@dataclass(frozen=True)
class Case:
    """One training."""

    model: Callable[[], nn.Module]
    objective: Any
    batch: Callable[[int], Any]
    train: dict[str, Any] = field(default_factory=dict)
    stops: tuple[int, ...] = (STEPS,)
    """Steps of each call of `fit`; the second goes on from the first's checkpoint."""
    sliced: bool = True
    """Built from each process's slices; else whole, and sharded then."""
    compiles: bool = False


def transformer(**changes) -> Callable[[], nn.Module]:
    return lambda: Transformer(replace(TRANSFORMER_CONFIG, **changes))


def dvae() -> nn.Module:
    return DVAE(DVAE_CONFIG).to(memory_format=torch.channels_last)


PLAIN = {
    "transformer": Case(transformer(), TransformerObjective(), token_batch),
    "bf16": Case(transformer(qk_norm=True), TransformerObjective(), token_batch, {"precision": "bf16"}),
    "fp16": Case(transformer(), Scaled(loud), token_batch, {"precision": "fp16"}),
    "dvae": Case(dvae, DVAEObjective(DVAELossConfig(beta=Schedule(1.0, 1.0))), pixel_batch),
    "dvae_fp16": Case(dvae, DVAEObjective(), pixel_batch, {"precision": "fp16"}),
    "clip": Case(lambda: CLIP(CLIP_CONFIG), CLIPObjective(), pair_batch),
    "diffusion": Case(unet, DiffusionObjective(UNET_CONFIG), diffusion_batch),
}
SEVERAL = PLAIN | {
    "transformer": replace(
        PLAIN["transformer"],
        model=transformer(activation_checkpointing=True),
        train={"grad_accum_steps": 2},
        stops=(2, STEPS),
    ),
    "dvae_fp16": replace(PLAIN["dvae_fp16"], stops=(2, STEPS)),
    "diffusion": replace(PLAIN["diffusion"], train={"grad_accum_steps": 2}, stops=(2, STEPS)),
    "fp16": replace(PLAIN["fp16"], model=transformer(activation_checkpointing=True)),
}
"""What several processes do: the same trainings, stopped, recomputed and in several passes, which changes no
result."""


def half_bad() -> nn.Module:
    """A transformer with NaN in the last row of a matrix, which under fsdp the last process alone holds."""
    model = Transformer(TRANSFORMER_CONFIG)
    with torch.no_grad():
        model.to_logits.weight[-1] = float("nan")
    return model


BROKEN = {
    "spoilt": Case(
        transformer(), Scaled(nan_in_last), token_batch, {"max_skipped_steps": 2, "eval_every": 9}, stops=(6,)
    ),
    "half_bad": Case(
        half_bad,
        TransformerObjective(),
        token_batch,
        {"max_skipped_steps": 1, "eval_every": 9},
        sliced=False,
    ),
}


FACTORED = {
    "whole": Case(transformer(), TransformerObjective(), token_batch, {"powersgd": PowerSGDConfig(1000)}),
    "factored": Case(
        transformer(),
        TransformerObjective(),
        lambda step: token_batch(0),  # so that its loss goes down
        {
            "powersgd": PowerSGDConfig(4),
            "grad_accum_steps": 2,
            "save_every": 3,
            "precision": "fp16",
            "ema": EMAConfig(decay=0.9, update_every=2, device="cpu"),
            "optimizer": replace(
                TRAIN.optimizer, plateau=PlateauConfig(max_reductions=2, window=2, patience=1, threshold=10.0)
            ),
        },
        stops=(8,),
    ),
    "factored_clip": Case(
        lambda: CLIP(CLIP_CONFIG), CLIPObjective(), pair_batch, {"powersgd": PowerSGDConfig(4)}
    ),
}
FACTORED["resumed"] = replace(FACTORED["factored"], stops=(6, 8))
"""Replicas average by factors (PowerSGD), and all else that a run remembers. A rank of 1000 would make
factors larger than gradients, which are then sent whole."""


def train(case: Case, parallel: Distributed, out: Path) -> TrainState:
    """One case, into a run directory."""

    def evaluate(model: nn.Module, step: int) -> dict[str, float]:
        batch = to_device(case.batch(50), parallel.device)
        return {"loss": float(case.objective(model, batch, step).total)}

    for steps in case.stops:
        torch.manual_seed(0)
        config = replace(TRAIN, **case.train)
        averaged = config.powersgd.rank is None
        model = parallel.build(case.model, averaged) if case.sliced else case.model().to(parallel.device)
        if case.compiles:
            parallel.wrap(model, config.precision, averaged)
            compile_layers(model, parallel.sharded, backend="aot_eager", fullgraph=True)
        state = Trainer(
            model,
            case.objective,
            lambda step: split(case.batch(step), parallel.world_size)[parallel.rank],
            config,
            steps=steps,
            seed=7,
            run_dir=out,
            meta={"kind": "case", "config": {}, "inputs": {}},
            evaluate=evaluate,
            dist=parallel,
        ).train()
    return state


def check_collectives(parallel: Distributed) -> None:
    """Collectives, and how much each process holds of a transformer."""
    rank, world, sharded = parallel.rank, parallel.world_size, parallel.sharded
    total = world * (world + 1) / 2
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = parallel.gather(rows)
    (gathered * (rank + 1)).sum().backward()  # each process weighs all rows by rank + 1
    assert gathered[:, 0].tolist() == [float(r) for r in range(world) for _ in range(2)]
    assert rows.grad[:, 0].tolist() == [total] * 2
    assert float(parallel.all_reduce(torch.tensor(rank + 1.0))) == total
    assert parallel.all_true(torch.tensor([True, rank == 0])).tolist() == [True, False]
    assert parallel.gather_results(lambda: 10 * rank) == [10 * r for r in range(world)]
    assert parallel.on_main(lambda: f"of {rank}") == "of 0"
    assert parallel.is_main == (rank == 0)

    def fail_on_1() -> None:
        if rank == 1:
            raise ValueError("error of 1")

    with pytest.raises(ValueError, match="error of 1"):
        parallel.gather_results(fail_on_1)
    model, for_powersgd = Transformer(TRANSFORMER_CONFIG), Transformer(TRANSFORMER_CONFIG)
    parallel.wrap(model, "fp32")
    held = sum(local(p).numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    assert held == pytest.approx(0.5 if sharded else 1, rel=0.1)
    for group in model.fsdp_groups():  # FSDP gathers layer by layer
        assert any(isinstance(m, FSDPModule) for m in group) == sharded
    parallel.wrap(for_powersgd, "fp32", averaged=False)
    if sharded:  # the MLP's second matrix by inputs (E.2)
        mlp = for_powersgd.layers[0].mlp.f
        assert [p.placements[0].dim for p in (mlp.expand.weight, mlp.project.weight)] == [0, 1]
        shape = {"fsdp": {"shard": 2}, "hsdp": {"replicate": 2, "shard": 2}}[parallel.mode]
        assert dict(zip(parallel.mesh.mesh_dim_names, parallel.mesh.shape, strict=True)) == shape


class RealBytes(LiveBytes):
    """Bytes of living storages, without those of the meta device; of DTensors only their shards."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        if storage.device.type != "meta":
            super()._add(storage, is_copy)


LONG = Case(transformer(depth=8, heads=4, head_dim=16), TransformerObjective(), token_batch, stops=(1,))


def check_start(parallel: Distributed, out: Path) -> None:
    """A sharded model starts, and resumes, in the memory of its slices and a block, with the same values."""
    torch.manual_seed(0)
    whole = LONG.model()
    size = sum(4 * p.numel() for p in whole.parameters())
    block = sum(4 * p.numel() for p in whole.layers[0].parameters())
    for averaged in (True, False):
        torch.manual_seed(0)
        with RealBytes() as live:
            model = parallel.build(LONG.model, averaged)
            parallel.wrap(model, "fp32", averaged)
        assert live.peak_of_all <= size / 2 + block
        for (name, found), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert torch.equal(found.full_tensor(), expected), name
    trained = train(LONG, parallel, out)
    with RealBytes() as live:
        model = parallel.build(LONG.model)
        state = init_train_state(model, TRAIN, 0, parallel)
        restore(latest_checkpoint(out), state, parallel)
    assert live.peak_of_all <= 4 * size / 2 + 1.5 * block  # weights, averages, two moments, a message
    expected, _ = trained.state_dict()
    for file, tensors in state.state_dict()[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(local(tensor), local(expected[file][name])), (file, name)


def check_init_from(parallel: Distributed) -> None:
    """A sharded model takes the weights of a smaller one as a whole model does."""
    source, grown = transformer(text_vocab=10)(), []
    for build in (lambda make: make(), parallel.build):
        torch.manual_seed(0)
        grown.append(build(transformer()))
    parallel.wrap(grown[1], "fp32")
    for model in grown:
        load_pretrained_weights("transformer", model, source)
    for one, other in zip(*(model.parameters() for model in grown), strict=True):
        assert torch.equal(one, other.full_tensor())


def work(rank: int, mode: str, out: Path, shard: int | None) -> dict[str, Any]:
    """Everything that one of several processes does; what it found and printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), Distributed.start(mode, "cpu", shard) as parallel:
        found: dict[str, Any] = {"collectives": traceback_of(check_collectives, parallel), "weights": {}}
        print(f"printed by process {parallel.rank}")
        if parallel.sharded:
            found["start"] = traceback_of(check_start, parallel, out / "long")
            found["init_from"] = traceback_of(check_init_from, parallel)
        for name, case in (SEVERAL | FACTORED).items():
            state = train(case, parallel, out / name)
            if name in FACTORED:
                weights = torch.cat([local(p).detach().flatten() for p in state.model.parameters()])
                found["weights"][name] = weights
        for name, case in BROKEN.items():
            found[name] = traceback_of(train, case, parallel, out / name)
    return found | {"printed": printed.getvalue()}


def compiled(rank: int, out: Path) -> None:
    """A sharded training with compiled layers, stopped and resumed, gives the weights of one without."""
    with Distributed.start("fsdp", "cpu") as parallel:
        for name in ("transformer", "clip", "dvae"):
            case, weights = SEVERAL[name], []
            for compiles in (False, True):
                state = train(replace(case, compiles=compiles), parallel, out / f"{name}-{compiles}")
                weights.append([local(p) for p in state.model.parameters()])
            torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def hang(rank: int) -> str:
    """The second process does not answer; what the first one reports."""
    distributed.MONITOR_TIMEOUT = timedelta(seconds=1)
    try:
        with Distributed.start("ddp", "cpu", timeout_minutes=1 / 30) as parallel:
            parallel.all_reduce(torch.ones(1))
            time.sleep(5 * rank)
            parallel.all_reduce(torch.ones(1))
    except RuntimeError as error:
        return "\n".join(getattr(error, "__notes__", []))
    return "nothing"
