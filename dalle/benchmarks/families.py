"""Speed of training steps of the dVAE and of CLIP, on random images, at the paper's sizes unless given."""

from functools import partial
from statistics import median
from typing import Any

import torch

from dalle.benchmarks.common import Stepper, finish, time_rounds
from dalle.benchmarks.config import FamiliesBenchmark
from dalle.clip.objective import CLIPObjective
from dalle.dvae.objective import DVAEObjective
from dalle.train.loggers import peak_flops, peak_memory
from dalle.train.precision import resolve_device, resolve_precision


def benchmark_families(args: FamiliesBenchmark) -> dict[str, Any]:
    """Seconds of a step, images per second and peak memory of each; of the dVAE also MFU, if known."""
    device = resolve_device(args.device)
    precision = resolve_precision(args.precision, device)
    clip = args.clip
    images = torch.rand(args.dvae_batch, 3, args.resolution, args.resolution, device=device)
    pairs = (
        torch.rand(args.clip_batch, 3, clip.image_size, clip.image_size, device=device),
        torch.randint(clip.text_vocab, (args.clip_batch, clip.text_len), device=device),
    )
    cases = {"dvae": (args.dvae, DVAEObjective(), images), "clip": (clip, CLIPObjective(), pairs)}
    results = {}
    for kind, (config, objective, batch) in cases.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        step = Stepper(kind, config, objective, device, precision)
        work = {kind: partial(step, batch)}
        time_rounds(work, 1, device)
        seconds = median(time_rounds(work, args.rounds, device)[kind])
        cost, peak = objective.step_cost(step.model, batch), peak_flops(device, precision)
        results[kind] = {"seconds": seconds, "images_per_sec": cost.samples / seconds}
        results[kind]["peak_memory_gib"] = peak_memory(device)
        if cost.flops and peak:
            results[kind]["mfu"] = cost.flops / seconds / peak
    return finish({"results": results, "precision": precision}, args.json, device)
