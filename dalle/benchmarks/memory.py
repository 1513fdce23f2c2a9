"""Peak memory of a training step: joint against chunked logits, with and without activation checkpointing.

Each variant runs in a process of its own, since the peak of a process never falls.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.benchmarks.common import finish, random_ids
from dalle.benchmarks.config import MemoryBenchmark
from dalle.hub.registry import build_model
from dalle.train.loggers import peak_memory
from dalle.train.precision import autocast, resolve_device, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.losses import cross_entropies, weighted_cross_entropy

VARIANTS = {  # chunked logits, activation checkpointing
    "joint logits": (False, False),
    "chunked logits": (True, False),
    "joint logits, activation checkpointing": (False, True),
    "chunked logits, activation checkpointing": (True, True),
}


def benchmark_memory(args: MemoryBenchmark) -> dict[str, Any]:
    """Peak GiB of each variant: of the process on a CPU, of what torch allocates on CUDA."""
    device = resolve_device(args.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        peaks = {name: pool.submit(peak_of_step, args, *flags).result() for name, flags in VARIANTS.items()}
    joint = args.batch_size * args.config.layout.seq_len * args.config.layout.vocab
    report = {
        "results": {name: {"peak_gib": peak} for name, peak in peaks.items()},
        "joint_logits_gib": 4 * joint / 2**30,
        "batch_size": args.batch_size,
        "precision": resolve_precision(args.precision, device),
    }
    return finish(report, args.json, device)


def peak_of_step(args: MemoryBenchmark, chunked: bool, activation_checkpointing: bool) -> float:
    """Peak GiB of this process, or of CUDA in it, after a step."""
    device = resolve_device(args.device)
    torch.manual_seed(0)
    config = replace(args.config, activation_checkpointing=activation_checkpointing)
    model = build_model("transformer", config).to(device)
    ids = random_ids(model.layout, args.batch_size).to(device)
    with autocast(resolve_precision(args.precision, device), device):
        losses = cross_entropies(model, ids) if chunked else joint_cross_entropies(model, ids)
    weighted_cross_entropy(*losses).backward()
    return peak_memory(device)


def joint_cross_entropies(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The text and image losses from the joint logits of all positions at once."""
    logits, mask, text_len = model(ids), model.layout.loss_mask(ids), model.layout.text_len
    text, image = mask.clone(), mask.clone()
    text[:, text_len:], image[:, :text_len] = False, False
    return tuple(F.cross_entropy(logits[mask], ids[mask]) for mask in (text, image))
