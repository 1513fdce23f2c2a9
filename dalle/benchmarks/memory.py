"""Peak memory of a training step: plain logits against chunks of them, kept resblocks against recomputed ones.

Each variant runs in a process of its own, since the peak of a process never falls.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.benchmarks.common import hardware, save_report
from dalle.hub.registry import build_model
from dalle.io.files import make_directory
from dalle.train.loggers import peak_memory
from dalle.train.precision import Precision, autocast, resolve_device, resolve_precision
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.losses import cross_entropies, weighted_cross_entropy
from dalle.transformer.sizes import SIZES, parameter_counts

VARIANTS = {  # chunked logits, activation_checkpointing
    "plain logits": (False, False),
    "chunked logits": (True, False),
    "plain logits, activation_checkpointing": (False, True),
    "chunked logits, activation_checkpointing": (True, True),
}


@dataclass(frozen=True)
class MemoryBenchmark:
    """Measures the peak memory of forward and backward, without an optimizer, in four variants."""

    size: str | None = None
    """A named size (tiny, 60m, 120m, 350m, 1.3b, 2.8b, 5.6b, 12b) instead of --model."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer."""
    batch_size: int = 8
    """Streams in a step."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    device: str = "auto"
    """cuda or cpu; auto takes cuda if it is there."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; expected one of {', '.join(SIZES)}")
        if self.batch_size < 1:
            raise ValueError(f"batch-size must be positive, got {self.batch_size}")

    @property
    def config(self) -> TransformerConfig:
        """The shape to measure."""
        return SIZES[self.size] if self.size else self.model


def benchmark_memory(run: MemoryBenchmark) -> dict[str, Any]:
    """GiB at the peak of each variant: of the process on a CPU, of what torch allocates on CUDA; writes --json."""
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        peaks = {name: pool.submit(peak_of_step, run, *how).result() for name, how in VARIANTS.items()}
    layout = run.config.layout
    report = {
        "peak_gib": peaks,
        "weights_and_gradients_gib": 2 * 4 * sum(parameter_counts(run.config).values()) / 2**30,
        "joint_logits_gib": 4 * run.batch_size * layout.seq_len * layout.vocab / 2**30,
        "batch_size": run.batch_size,
        "precision": resolve_precision(run.precision, device),
        "hardware": hardware(device),
    }
    save_report(report, run.json)
    print(f"{'variant':28}peak GiB   ({report['precision']}, batch {run.batch_size}, {report['hardware']})")
    for name, peak in peaks.items():
        print(f"{name:28}{peak:8.2f}")
    return report


def peak_of_step(run: MemoryBenchmark, chunked: bool, activation_checkpointing: bool) -> float:
    """Peak GiB of this process, or of CUDA in it, after a step."""
    device = resolve_device(run.device)
    torch.manual_seed(0)
    model = build_model(
        "transformer", replace(run.config, activation_checkpointing=activation_checkpointing)
    ).to(device)
    layout = model.layout
    text = torch.randint(layout.text_vocab, (run.batch_size, layout.text_len))
    ids = layout.pack(text, torch.randint(layout.image_vocab, (run.batch_size, layout.num_image_tokens))).to(
        device
    )
    with autocast(resolve_precision(run.precision, device), device):
        losses = cross_entropies(model, ids) if chunked else plain_cross_entropies(model, ids)
    weighted_cross_entropy(*losses).backward()
    return peak_memory(device)


def plain_cross_entropies(model: Transformer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same two means from the joint logits of all positions at once: the obvious way."""
    logits, counts, text = model(ids), model.layout.loss_mask(ids), model.layout.text_len
    of_text, of_image = counts.clone(), counts.clone()
    of_text[:, text:], of_image[:, :text] = False, False
    return tuple(F.cross_entropy(logits[kept], ids[kept]) for kept in (of_text, of_image))
