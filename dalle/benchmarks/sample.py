"""Speed of sampling image tokens: decode steps, their matrix products alone, and DALLE-pytorch, in one run.

A step reads every weight once, whatever the batch; the bytes it must read over its seconds are a fraction of
the bandwidth, which a large copy measures. Random weights take the same time as trained ones.
"""

from collections import deque
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dalle.benchmarks.common import finish, seconds_of
from dalle.benchmarks.config import SampleBenchmark
from dalle.benchmarks.dalle_pytorch import DallePytorchSampler
from dalle.train.loggers import peak_memory
from dalle.train.precision import DTYPES, resolve_device, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.generate import cast_linear_weights, decode_step_of, generate_tokens, quantize_int8
from dalle.transformer.sizes import cache_bytes, read_bytes

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28, "mps": 2**28}


@torch.inference_mode()
def benchmark_sampling(args: SampleBenchmark) -> dict[str, Any]:
    """Times every batch size.

    Raises:
        ValueError: CUDA graphs or the other package cannot run here.
    """
    device = resolve_device(args.device)
    if args.graph and device.type != "cuda":
        raise ValueError(f"--graph needs cuda, the device is {device.type}; leave it out")
    precision = resolve_precision(args.precision, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = cast_linear_weights(Transformer(args.config).requires_grad_(False).eval(), DTYPES[precision])
        model = quantize_int8(model) if args.int8 else model
    bandwidth = copy_rate(device)
    results = {f"batch {batch}": _time_batch(args, model, batch, bandwidth) for batch in args.batch}
    image_tokens = args.config.layout.num_image_tokens
    if args.baseline != "none":
        theirs = DallePytorchSampler(args.config, args.attn_types, device)
        seconds = median(seconds_of(lambda: theirs(args.num_tokens), device) for _ in range(args.rounds))
        per_image = seconds * image_tokens / args.num_tokens
        for line in results.values():
            line[f"speedup_vs_{args.baseline}"] = per_image / line["seconds_per_image"]
        results[args.baseline] = {"batch": 1, "seconds_per_image": per_image, **theirs.facts}
    report = {
        "results": results,
        "precision": precision,
        "int8": args.int8,
        "graph": args.graph,
        "compile": args.compile,
        "tokens_sampled": args.num_tokens,
        "image_tokens": image_tokens,
        "copy_bytes_per_second": bandwidth,
        "peak_memory_gib": peak_memory(device),
    }
    return finish(report, args, device)


def _time_batch(args: SampleBenchmark, model: Transformer, batch: int, bandwidth: float) -> dict[str, Any]:
    """Times the caption and the first token (with --graph also the second) apart from the other steps."""
    weight, layout = model.layers[0].mlp.f.expand.weight, model.layout
    device, image_tokens = weight.device, layout.num_image_tokens
    text = layout.pad_text([list(range(min(20, layout.max_caption_len)))]).to(device)
    noise = torch.rand(1, batch, image_tokens, dtype=torch.float64)
    head = 2 if args.graph else 1
    steps = args.num_tokens - head

    def sampler():
        step = decode_step_of(model, args.compile, args.graph)
        return generate_tokens(model, text, noise, step=step)

    def take(tokens, count: int) -> float:
        return seconds_of(lambda: deque(islice(tokens, count), maxlen=0), device)

    compiling = take(sampler(), 2) if args.compile else 0.0
    rounds = []
    for _ in range(args.rounds):
        tokens = sampler()
        products = seconds_of(lambda: _matrix_products(model, batch, weight.dtype, steps), device)
        rounds.append((take(tokens, head), take(tokens, steps) / steps, products / steps))
    first, step, products = (median(values) for values in zip(*rounds, strict=True))
    read = read_bytes(args.config, batch, weight.itemsize, args.int8)
    per_caption, per_candidate = cache_bytes(args.config, weight.itemsize)
    return {
        "batch": batch,
        "seconds_per_image": (first + step * (image_tokens - head)) / batch,
        "time_to_first_token": first,
        "seconds_per_step": step,
        "compile_seconds": compiling,
        "tokens_per_sec": batch / step,
        "overhead_vs_matmul": step / products,
        "bytes_per_step": read,
        "bandwidth_utilization": read / step / bandwidth,
        "cache_bytes_per_caption": per_caption,
        "cache_bytes_per_candidate": per_candidate,
    }


def _matrix_products(model: Transformer, batch: int, dtype: torch.dtype, steps: int) -> None:
    """The products with the layers' matrices and the output matrix, and nothing else."""
    x: Tensor = torch.randn(batch, model.config.width, device=model.row.weight.device, dtype=dtype)
    wide, state = x.repeat(1, 4), x.float()
    for _ in range(steps):
        for layer in model.layers:
            attention, mlp = layer.attention.f, layer.mlp.f
            attention.qkv(x), attention.out(x), mlp.expand(x), mlp.project(wide)
        model.image_logits(state)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes: the best of eight."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(8))
