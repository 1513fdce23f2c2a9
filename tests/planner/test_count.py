"""A counted step against a real one: parameters, FLOPs and peak memory."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dalle.benchmarks.common import Stepper, random_ids
from dalle.clip import CLIPConfig
from dalle.clip.objective import CLIPObjective
from dalle.dvae import DVAEConfig
from dalle.dvae.objective import DVAEObjective
from dalle.planner.count import estimate_step
from dalle.planner.memory import ParallelLayout, StepEstimate, memory
from dalle.train.config import TrainConfig
from dalle.transformer import TransformerConfig
from dalle.transformer.objective import TransformerObjective, training_flops

TEXT = {"text_len": 16, "text_vocab": 300}
TINY = TransformerConfig(
    2, 2, 16, grid=(8, 8), image_vocab=64, conv_kernel=3, attention_backend="sdpa", **TEXT
)
WIDE = replace(TINY, heads=16, depth=3, text_vocab=50, image_vocab=32)  # weights outweigh activations
LONG = replace(TINY, text_len=64, grid=(24, 24), depth=3)  # the other way round
BALANCED = replace(TINY, heads=4, grid=(16, 16), depth=4)
DVAE = DVAEConfig(widths=(16, 32), downsample_factor=2, vocab_size=64, codebook_dim=16)
TOWERS = {"vision_width": 64, "vision_layers": 2, "text_width": 64, "text_layers": 2, "head_dim": 32}
CLIP = CLIPConfig(embed_width=32, image_size=32, patch_size=8, **TOWERS, **TEXT)


def real(kind: str, config, precision: str = "fp32", batch: int = 4) -> tuple[Stepper, object]:
    """A training step that can be taken, and a batch for it."""
    pixels = torch.rand(batch, 3, 32, 32)
    if kind == "transformer":
        objective, samples = TransformerObjective(), random_ids(config.layout, batch)
    elif kind == "dvae":
        objective, samples = DVAEObjective(), pixels
    else:
        packed = torch.randint(config.text_vocab, (batch, config.text_len))
        objective, samples = CLIPObjective(), (pixels, packed)
    return Stepper(kind, config, objective, torch.device("cpu"), precision), samples


def planned(kind: str, config, precision: str = "fp32", batch: int = 4) -> StepEstimate:
    return estimate_step(kind, config, batch, precision, side=32)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("transformer", TINY),
        ("transformer", replace(TINY, activation_checkpointing=True)),
        ("transformer", replace(TINY, attention_backend="window")),
        ("dvae", DVAE),
        ("clip", CLIP),
    ],
)
def test_parameters_and_operations_are_those_of_a_real_step(kind, config):
    step, batch = real(kind, config)
    with FlopCounterMode(display=False) as counted:
        loss = step.objective(step.model, batch, 0)
        loss.total.backward()
    plan = planned(kind, config)
    flops = plan.flops
    assert plan.parameters == sum(p.numel() for p in step.model.parameters())
    if kind == "clip":  # open_clip's attention is not fused on a CPU
        by_operator = counted.get_flop_counts()["Global"].items()
        assert flops["matrices"] == sum(n for operator, n in by_operator if "bmm" not in str(operator))
    else:
        assert sum(flops.values()) == counted.get_total_flops()


def test_operations_of_the_transformer_by_formula():
    """6 a parameter and token in matrices; attention of all pairs, 2 products forward and 5 backward."""
    batch, layout, width = 4, TINY.layout, TINY.width
    flops = planned("transformer", TINY).flops
    needed = training_flops(TINY)
    assert flops["matrices"] == batch * (needed["matrices"] + needed["logits"])
    assert flops["attention"] == batch * TINY.depth * 7 * 2 * layout.seq_len**2 * width
    assert flops["attention"] > batch * needed["attention"]
    again = planned("transformer", replace(TINY, activation_checkpointing=True)).flops
    assert again["attention"] == flops["attention"] * 9 // 7
    layers = batch * needed["matrices"]
    assert training_flops(TransformerConfig())["matrices"] == 6 * 12 * 3968**2 * 64 * 1280
    assert again["matrices"] == flops["matrices"] + layers * 7 // 36  # a block's last product is not repeated


@pytest.mark.parametrize(
    ("kind", "config", "precision"),
    [
        ("transformer", WIDE, "fp32"),
        ("transformer", LONG, "fp32"),
        ("transformer", LONG, "bf16"),
        ("transformer", LONG, "fp16"),
        ("transformer", replace(LONG, activation_checkpointing=True), "bf16"),
        ("transformer", replace(BALANCED, activation_checkpointing=True, depth=12), "fp32"),
        ("transformer", replace(LONG, attention_backend="window"), "fp32"),
        ("transformer", BALANCED, "fp32"),
        ("transformer", BALANCED, "bf16"),
        ("dvae", DVAE, "fp32"),
        ("dvae", DVAE, "bf16"),
        ("clip", CLIP, "fp32"),
    ],
)
def test_memory_of_a_real_step_within_15_percent(kind, config, precision):
    """Most bytes that torch's allocator on a CPU has given out during two steps, by the profiler."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as seen:
        step, batch = real(kind, config, precision)
        for _ in range(2):
            for optimizer in step.state.optimizers:
                optimizer.zero_grad()
            step(batch)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    measured = max(accumulate(sizes))
    layout = ParallelLayout(TrainConfig(), "none", half=precision != "fp32")
    plan = memory(planned(kind, config, precision), layout)["peak"]
    assert plan == pytest.approx(measured, rel=0.15)
