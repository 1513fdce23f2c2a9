"""Arguments of the benchmarks (no torch here)."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, get_args

from dalle.clip.config import CLIPConfig
from dalle.config import check_positive, configuration
from dalle.data.config import DataConfig
from dalle.dvae import DVAEConfig
from dalle.train.config import Precision
from dalle.transformer.config import SIZES, TransformerConfig

Backend = Literal["auto", "dense", "sdpa", "window", "flex"]
Baseline = Literal["none", "dalle-pytorch"]


@configuration
class BenchmarkArgs:
    """What every benchmark takes."""

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


@configuration
class TransformerBenchmark(BenchmarkArgs):
    """What every benchmark of a transformer takes."""

    size: Literal[*SIZES] | None = None
    """A named size; of --model only activation checkpointing is taken then."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer."""

    @property
    def config(self) -> TransformerConfig:
        """The shape that is measured."""
        if self.size is None:
            return self.model
        return replace(SIZES[self.size], activation_checkpointing=self.model.activation_checkpointing)


@configuration
class TrainBenchmark(TransformerBenchmark):
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
    plan: bool = False
    """Also count what plan.py expects as peak memory of a step, which takes up to a minute."""


@configuration
class SampleBenchmark(TransformerBenchmark):
    """Times sampling image tokens from a transformer with random weights."""

    batch: tuple[int, ...] = (1, 8, 64)
    """Candidates of one caption that are sampled together; several numbers are measured in turn."""
    tokens: int | None = None
    """Image tokens to sample, by default whole images; seconds per image are by proportion."""
    int8: bool = False
    """Store the matrices of the layers in 8 bits."""
    graph: bool | None = None
    """Record a step as a CUDA graph and replay it; by default on CUDA."""
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


@configuration
class AttentionBenchmark(TransformerBenchmark):
    """Times attention over all layers of a model, by each backend and as causal attention."""

    model: TransformerConfig = TransformerConfig(heads=16)
    """Layer kinds, heads and lengths; time grows in proportion to batch-size times heads."""
    backends: tuple[Backend, ...] = ("auto", "sdpa", "window")
    """Attention backends."""
    batch_size: int = 1
    """Sequences."""
    rounds: int = 10
    """Timed rounds, after three warm-up rounds."""


@configuration
class MemoryBenchmark(TransformerBenchmark):
    """Measures the peak memory of forward and backward, without an optimizer, in four variants."""

    batch_size: int = 8
    """Sequences per step."""


@configuration
class OpenBenchmark(TransformerBenchmark):
    """Times opening a model directory of random weights: the first time, and `rounds` times again."""

    rounds: int = 2
    """Later openings."""


@configuration
class DataBenchmark(TransformerBenchmark):
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


@configuration
class FamiliesBenchmark(BenchmarkArgs):
    """Times training steps of the dVAE and of CLIP on random images."""

    dvae: DVAEConfig = DVAEConfig()
    """Shape of the dVAE."""
    resolution: int = 256
    """Pixels on a side of its images."""
    clip: CLIPConfig = CLIPConfig()
    """Shape of CLIP."""
    dvae_batch: int = 8
    """Images per step of the dVAE."""
    clip_batch: int = 64
    """Pairs per step of CLIP."""
    rounds: int = 5
    """Timed steps of each, after one warm-up step."""


@configuration
class RatesBenchmark(BenchmarkArgs):
    """Measures the bytes per second of copies on the device, and the FLOP/s of its matrix products."""

    megabytes: float = 2048
    """Size of the copied tensor."""
    side: int = 8192
    """Rows and columns of the matrices."""
    rounds: int = 10
    """Timed rounds, after one warm-up round."""


PartName = Literal[
    "tests", "rates", "train-1.3b", "sample-12b", "candidates-12b", "attention", "sample-1.3b", "families"
]


@configuration
class GPUBenchmark:
    """Runs what the paper's sizes need on a GPU, most important first, within a time limit."""

    minutes: float = 8
    """Time for all parts; what is left over is reported as such."""
    parts: tuple[PartName, ...] = get_args(PartName)
    """What to run, in this order."""
    small: bool = False
    """Tiny models: tries the command where there is no GPU."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first available."""
    json: Path | None = None
    """File for the report, written again after each part."""

    def __post_init__(self):
        check_positive(self, "minutes")
        if not self.parts:
            raise ValueError("parts must name at least one")
