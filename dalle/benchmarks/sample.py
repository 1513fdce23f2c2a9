"""Speed of sampling image tokens: decode steps, their matrix products alone, and DALLE-pytorch, in one run.

Random weights take the same time as trained ones.
"""

from collections import deque
from dataclasses import replace
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


@torch.inference_mode()
def benchmark_sample(args: SampleBenchmark) -> dict[str, Any]:
    """Times every batch size.

    Raises:
        ValueError: CUDA graphs or the other package cannot run here.
    """
    device = resolve_device(args.device)
    args = replace(args, graph=device.type == "cuda" if args.graph is None else args.graph)
    precision = resolve_precision(args.precision, device, inference=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = cast_linear_weights(Transformer(args.config).requires_grad_(False).eval(), DTYPES[precision])
        model = quantize_int8(model) if args.int8 else model
    image_tokens = args.config.layout.num_image_tokens
    tokens = args.tokens or image_tokens
    results: dict[str, dict[str, Any]] = {}
    for batch in args.batch:
        try:
            results[f"batch {batch}"] = _time_batch(args, model, batch, tokens)
        except torch.OutOfMemoryError:
            results[f"batch {batch}"] = {"batch": batch, "error": "out of memory"}
            torch.cuda.empty_cache()
    if args.baseline != "none":
        theirs = DallePytorchSampler(args.config, device)
        seconds = median(seconds_of(lambda: theirs(tokens), device) for _ in range(args.rounds))
        per_image = seconds * image_tokens / tokens
        for line in results.values():
            if "error" not in line:
                line[f"speedup_vs_{args.baseline}"] = per_image / line["seconds_per_image"]
        results[args.baseline] = {"batch": 1, "seconds_per_image": per_image, **theirs.facts}
    report = {
        "results": results,
        "precision": precision,
        "int8": args.int8,
        "graph": args.graph,
        "compile": args.compile,
        "tokens_sampled": tokens,
        "image_tokens": image_tokens,
        "peak_memory_gib": peak_memory(device),
    }
    return finish(report, args.json, device)


def _time_batch(args: SampleBenchmark, model: Transformer, batch: int, count: int) -> dict[str, Any]:
    """Times the caption and the first token (with --graph also the second) apart from the rest of `count`."""
    weight, layout = model.layers[0].mlp.f.expand.weight, model.layout
    device, image_tokens = weight.device, layout.num_image_tokens
    text = layout.pad_text([list(range(min(20, layout.max_caption_len)))]).to(device)
    noise = torch.rand(1, batch, image_tokens, dtype=torch.float64)
    head = 2 if args.graph else 1
    steps = count - head

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
    return {
        "batch": batch,
        "seconds_per_image": (first + step * (image_tokens - head)) / batch,
        "time_to_first_token": first,
        "seconds_per_step": step,
        "compile_seconds": compiling,
        "tokens_per_sec": batch / step,
        "weight_bytes_per_sec": _weight_bytes(model) / step,
        "overhead_vs_matmul": step / products,
    }


def _weight_bytes(model: Transformer) -> float:
    """Bytes of the weights that a step reads at least: the layers' and the image tokens' output matrix."""
    layers, output = (
        sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
        for part in (model.layers, model.to_logits)
    )
    return layers + output * model.config.image_vocab / model.layout.vocab


def _matrix_products(model: Transformer, batch: int, dtype: torch.dtype, steps: int) -> None:
    """The products with the layers' matrices and the output matrix, and nothing else."""
    x: Tensor = torch.randn(batch, model.config.width, device=model.row.weight.device, dtype=dtype)
    wide, state = x.repeat(1, 4), x.float()
    for _ in range(steps):
        for layer in model.layers:
            attention, mlp = layer.attention.f, layer.mlp.f
            attention.qkv(x), attention.out(x), mlp.expand(x), mlp.project(wide)
        model.image_logits(state)
