"""How fast images are drawn: whole steps, their matrix products alone, and DALLE-pytorch, in one run.

A step reads every matrix once, whatever the batch; the bytes that it must read over the seconds that it takes are
its share of the bandwidth, which a large copy measures beside it. Random weights of a shape time as trained ones.
Times on a shared machine swing: every round times each contender once, and medians are reported.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dalle.benchmarks.common import hardware, save_report, seconds_of
from dalle.benchmarks.dalle_pytorch import MIX, DallePytorchDraw
from dalle.io.files import make_directory
from dalle.nn.int8 import weight_like
from dalle.nn.kv_cache import kv_cache_bytes
from dalle.train.loggers import peak_memory
from dalle.train.precision import DTYPES, Precision, resolve_device, resolve_precision
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.generate import DecodeState, cast_linear_weights, quantize_int8
from dalle.transformer.sizes import SIZES, read_bytes

AS_FAST = "times_as_fast_as_dalle-pytorch"
COPIED = {"cuda": 2**31}  # bytes of the copy that measures the bandwidth
COPIED_ELSEWHERE = 2**28


@dataclass(frozen=True)
class SampleBenchmark:
    """Times the drawing of image tokens of a transformer with random weights."""

    size: str | None = None
    """A named size (tiny, 60m, 120m, 350m, 1.3b, 2.8b, 5.6b, 12b) instead of --model."""
    model: TransformerConfig = TransformerConfig(depth=8, heads=8)
    """Shape of the transformer."""
    batch: tuple[int, ...] = (1, 8, 64)
    """Candidates of one caption that are drawn together; several are measured one after the other."""
    tokens: int | None = None
    """Image tokens to draw, from the first on; the whole image unless given. Seconds an image are then by
    proportion, and the first tokens have fewer keys to read than the later ones."""
    rounds: int = 1
    """How often each contender draws; the medians are reported."""
    precision: Precision = "auto"
    """fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    int8: bool = False
    """Keep the layers' matrices in 8 bits."""
    graph: bool = False
    """On CUDA, record a step as one graph of kernels and replay it."""
    compile: bool = False
    """Compile a step; seconds of compiling are told apart and are in no other number."""
    against: Literal["none", "dalle-pytorch"] = "none"
    """Another package to time in the same run, with its cache on and in fp32: dalle-pytorch 1.6.6, if installed."""
    attn_types: tuple[str, ...] = MIX
    """Kinds of that package's layers, repeated to the depth: axial_row, axial_col, conv_like or full."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    json: Path | None = None
    """File for the report; printed too."""

    def __post_init__(self):
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}; expected one of {', '.join(SIZES)}")
        if not self.batch or min(*self.batch, self.rounds) < 1:
            raise ValueError("batch and rounds must be positive, and batch name at least one")
        slots = self.config.layout.num_image_tokens
        if self.tokens is not None and not 2 <= self.tokens <= slots:
            raise ValueError(f"tokens must be 2 to {slots}, got {self.tokens}")

    @property
    def config(self) -> TransformerConfig:
        """The shape to time."""
        return SIZES[self.size] if self.size else self.model

    @property
    def drawn(self) -> int:
        """Image tokens that are drawn of each image."""
        return self.tokens or self.config.layout.num_image_tokens


@torch.inference_mode()
def benchmark_sampling(run: SampleBenchmark) -> dict[str, Any]:
    """Times every batch; writes --json.

    Raises:
        ValueError: the other package cannot run here.
    """
    if run.json:
        make_directory(run.json.parent)
    device = resolve_device(run.device)
    if run.graph and device.type != "cuda":
        raise ValueError(f"graph is for cuda, the device is {device.type}; leave it out")
    precision = resolve_precision(run.precision, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = cast_linear_weights(Transformer(run.config).requires_grad_(False).eval(), DTYPES[precision])
        model = quantize_int8(model) if run.int8 else model
    bandwidth = copy_rate(device)
    lines = [_of_batch(run, model, batch, device, bandwidth) for batch in run.batch]
    report = {
        "seconds_per_image": min(line["seconds_per_image"] for line in lines),
        "precision": precision,
        "int8": run.int8,
        "graph": run.graph,
        "compile": run.compile,
        "tokens_drawn": run.drawn,
        "image_tokens": run.config.layout.num_image_tokens,
        "copy_bytes_per_second": bandwidth,
        "batches": lines,
        "peak_memory_gib": peak_memory(device),
        "hardware": hardware(device),
    }
    if run.against == "dalle-pytorch":
        theirs = DallePytorchDraw(run.config, run.attn_types, device)
        seconds = statistics.median(seconds_of(lambda: theirs(run.drawn), device) for _ in range(run.rounds))
        per_image = seconds * run.config.layout.num_image_tokens / run.drawn
        ratios = {str(line["batch"]): per_image / line["seconds_per_image"] for line in lines}
        report["dalle-pytorch"] = {"batch": 1, "seconds_per_image": per_image, **theirs.facts()}
        report[AS_FAST] = ratios  # by batch
    save_report(report, run.json)
    _print(report)
    return report


def _of_batch(
    run: SampleBenchmark, model: Transformer, batch: int, device: torch.device, rate: float
) -> dict[str, Any]:
    """Caption and first token are timed apart from the steps."""
    config, rounds = run.config, []
    compiling = seconds_of(OurDraw(run, model, batch, device).compile, device) if run.compile else 0.0
    for _ in range(run.rounds):
        draw = OurDraw(run, model, batch, device)
        begin = seconds_of(draw.begin, device)
        rounds.append((begin, seconds_of(draw.steps, device), seconds_of(draw.products, device)))
    begin, steps, products = (statistics.median(part) for part in zip(*rounds, strict=True))
    count, slots = run.drawn - 1, config.layout.num_image_tokens
    step = steps / count
    text, image = kv_cache_bytes(draw.drawing.caches)
    read = read_bytes(config, batch, weight_like(model.layers[0].mlp.f.expand).itemsize, run.int8)
    return {
        "batch": batch,
        "seconds_per_image": (begin + step * (slots - 1)) / batch,
        "seconds_to_the_first_token": begin,
        "seconds_per_step": step,
        "seconds_of_compiling": compiling,
        "tokens_per_sec": batch / step,
        "times_of_matrix_products_alone": step / (products / count),
        "bytes_per_step": read,
        "share_of_copy_rate": read / step / rate,
        "cache_bytes_per_caption": text,
        "cache_bytes_per_candidate": image,
    }


class OurDraw:
    """One caption, n candidates: its beginning, the steps, and the matrix products of as many steps."""

    def __init__(self, run: SampleBenchmark, model: Transformer, batch: int, device: torch.device):
        self.run, self.model, self.batch, self.device = run, model, batch, device
        layout = model.layout
        self.text = layout.pad_text([torch.arange(min(20, layout.max_caption_len)).tolist()]).to(device)
        self.noise = torch.rand(1, batch, layout.num_image_tokens, dtype=torch.float64)

    def begin(self) -> None:
        """Reads the caption and draws the first token; on CUDA with a graph, also records the step."""
        self.drawing = DecodeState(self.model, self.text, self.noise, None, None, self.run.compile)
        self.advance = self.drawing.recorded() if self.run.graph else self.drawing.advance
        self.drawing.choose(self._slot(0), {})
        if self.run.graph:
            self.advance(self._slot(1), {})

    def compile(self) -> None:
        """What a compiled step takes before it can be timed: the first two tokens."""
        self.begin()
        self.advance(self._slot(1), {})

    def steps(self) -> None:
        """All tokens but the first."""
        for slot in range(1, self.run.drawn):
            self.advance(self._slot(slot), {})

    def products(self) -> None:
        """The layers' and the output matrix, and nothing else."""
        dtype = weight_like(self.model.layers[0].mlp.f.expand).dtype
        narrow = torch.randn(self.batch, self.run.config.width, device=self.device, dtype=dtype)
        wide, state = narrow.repeat(1, 4), narrow.float()
        for _ in range(1, self.run.drawn):
            for layer in self.model.layers:
                attention, mlp = layer.attention.f, layer.mlp.f
                attention.qkv(narrow), attention.out(narrow), mlp.expand(narrow), mlp.project(wide)
            self.model.image_logits(state)

    def _slot(self, slot: int) -> Any:
        return slot if self.drawing.by_number else self.drawing.slots[slot : slot + 1]


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes here and now: the best of eight."""
    source = torch.empty(COPIED.get(device.type, COPIED_ELSEWHERE), dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))


def _print(report: dict[str, Any]) -> None:
    print(
        f"{report['hardware']}, {report['precision']}, {report['tokens_drawn']} of {report['image_tokens']} tokens"
    )
    for line in report["batches"]:
        shown = (
            f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in line.items()
        )
        print("  " + "  ".join(shown))
    if "dalle-pytorch" in report:
        print(f"  dalle-pytorch: {report['dalle-pytorch']}; ours times as fast: {report[AS_FAST]}")
