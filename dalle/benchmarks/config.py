"""Arguments of the benchmarks (no torch here)."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from dalle.data.config import DataConfig
from dalle.dvae import DVAEConfig
from dalle.train.config import Precision
from dalle.transformer.config import SIZES, TransformerConfig

Backend = Literal["auto", "dense", "sdpa", "window", "flex"]
Baseline = Literal["none", "dalle-pytorch"]


@dataclass(frozen=True)
class BenchmarkArgs:
    """What every benchmark takes."""

    size: Literal[*SIZES] | None = None
    """A named size; of --model only activation checkpointing is taken then."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer."""
    rounds: int = 1
    """Timed rounds; medians are reported."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the hardware supports it."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first available."""
    json: Path | None = None
    """File for the report, which is also printed."""

    def __post_init__(self):
        for name in (field.name for field in fields(self)):
            value, option = getattr(self, name), name.replace("_", "-")
            if value == ():
                raise ValueError(f"{option} must name at least one")
            if type(value) in (int, float) and not value > 0:
                raise ValueError(f"{option} must be positive, got {value}")

    @property
    def config(self) -> TransformerConfig:
        """The shape that is measured."""
        if self.size is None:
            return self.model
        return replace(SIZES[self.size], activation_checkpointing=self.model.activation_checkpointing)


@dataclass(frozen=True)
class TrainBenchmark(BenchmarkArgs):
    """Times training steps of a transformer on random tokens."""

    backends: tuple[Literal[Backend, "causal"], ...] = ("dense", "sdpa", "window")
    """Attention backends to compare; causal is a model without sparse layers."""
    baseline: Baseline = "none"
    """Another package to time in the same run, in fp32: dalle-pytorch 1.6.6, if installed."""
    batch_size: int = 2
    """Sequences per step."""
    rounds: int = 5
    """Timed steps of each backend, after one warm-up step."""
    compile: bool = False
    """Compile each layer."""
    peak_flops: float | None = None
    """The device's peak FLOP/s in that precision, for MFU; known GPUs need none."""


@dataclass(frozen=True)
class SampleBenchmark(BenchmarkArgs):
    """Times sampling image tokens from a transformer with random weights."""

    batch: tuple[int, ...] = (1, 8, 64)
    """Candidates of one caption that are sampled together; several numbers are measured in turn."""
    tokens: int | None = None
    """Image tokens to sample, by default whole images; seconds per image are by proportion."""
    int8: bool = False
    """Store the matrices of the layers in 8 bits."""
    graph: bool = False
    """On CUDA, record a step as one graph and replay it."""
    compile: bool = False
    """Compile a step; the time of compiling is reported apart."""
    baseline: Baseline = "none"
    """Another package to time in the same run, in fp32 with its cache: dalle-pytorch 1.6.6."""

    def __post_init__(self):
        super().__post_init__()
        if min(self.batch) < 1:
            raise ValueError(f"batch must be positive numbers, got {self.batch}")
        image_tokens = self.config.layout.num_image_tokens
        if self.tokens is not None and not 4 <= self.tokens <= image_tokens:
            raise ValueError(f"tokens must be 4 to {image_tokens}, got {self.tokens}")


@dataclass(frozen=True)
class AttentionBenchmark(BenchmarkArgs):
    """Times attention over all layers of a model, by each backend and as causal attention."""

    model: TransformerConfig = TransformerConfig(heads=16)
    """Layer kinds, heads and lengths; time grows in proportion to batch-size times heads."""
    backends: tuple[Backend, ...] = ("auto", "sdpa", "window")
    """Attention backends."""
    batch_size: int = 1
    """Sequences."""
    rounds: int = 10
    """Timed rounds, after three warm-up rounds."""


@dataclass(frozen=True)
class MemoryBenchmark(BenchmarkArgs):
    """Measures the peak memory of forward and backward, without an optimizer, in four variants."""

    batch_size: int = 8
    """Sequences per step."""


@dataclass(frozen=True)
class OpenBenchmark(BenchmarkArgs):
    """Times opening a model directory of random weights: the first time, and `rounds` times again."""

    rounds: int = 2
    """Later openings."""


@dataclass(frozen=True)
class DataBenchmark(BenchmarkArgs):
    """Times image sources and a cache of random tokens, alone and with a training step."""

    sources: tuple[str, ...] = ("shapes",)
    """Images and captions to compare, each as --data.path takes it; ratios are to the first case."""
    workers: tuple[int, ...] = (0, 1)
    """Worker processes; -1 chooses."""
    resolutions: tuple[int, ...] = (64,)
    """Pixels on a side."""
    data: DataConfig = DataConfig()
    """Other settings of the sources."""
    dvae: DVAEConfig = DVAEConfig(widths=(64, 128, 256), downsample_factor=4, vocab_size=1024)
    """The model whose training step reads the images."""
    batch_size: int = 8
    """Samples per step."""
    num_batches: int = 4
    """Batches timed in a round, alone and then with a step each."""
    rounds: int = 3
    """Times that every case is measured."""
