"""Sampling configuration of `DALLE.generate`, the scripts and the web page; imports no torch."""

import math
from dataclasses import dataclass

MIN_TEMPERATURE = 1e-30
"""Logits divided by less could overflow float32."""


@dataclass(frozen=True)
class SamplingConfig:
    """How image tokens are sampled."""

    temperature: float = 1.0
    """1 in the paper; 0 is greedy."""
    top_k: int | None = None
    """Sample among the k most likely tokens only."""
    top_p: float | None = None
    """Sample among the fewest most likely tokens whose probability reaches p."""
    guidance: float | None = None
    """Scale of classifier-free guidance; needs a model trained with caption dropout."""
    batch_size: int | None = None
    """Candidates per decoding step; by default 16 on a CPU and 64 elsewhere, or fewer where memory is short.
    The last bits of a logit, and so rarely a token, depend on it."""
    prompts_per_batch: int | None = None
    """Prompts that share a decoding step; by default as many as fit with all their candidates. A fixed number
    gives the same bits for any number of prompts and candidates."""
    decode_batch_size: int | None = None
    """Images decoded and scored at once; by default as many as half of the free memory holds."""
    cuda_graph: bool = False
    """Record a decoding step as a CUDA graph and replay it."""
    compile: bool = False
    """Compile the decoding step: half a minute or more at first, so it pays for many candidates."""

    def __post_init__(self):
        if not (self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < math.inf):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, 1 for the plain model, got {self.guidance}")
        for name in ("top_k", "batch_size", "prompts_per_batch", "decode_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
