"""Metrics of scripts/evaluate.py, one function each: EvalContext -> report."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.data import sample_captions
from dalle.dvae import DVAE
from dalle.evals import fid, reconstruction
from dalle.evals.best_of_n import best_of_n, sizes
from dalle.evals.clip import accuracy, class_vectors, clip_scores, retrieval, typographic_attack, zero_shot
from dalle.evals.context import RESIZE, EvalContext
from dalle.evals.likelihood import bits_per_dim, nats_per_token
from dalle.evals.running_mean import MeanMetric
from dalle.evals.shapes_accuracy import caption_accuracy
from dalle.io.images import to_tensor
from dalle.pipelines.generation import Generation
from dalle.shapes.judge import matches_caption


def shapes_metrics(context: EvalContext) -> dict[str, Any]:
    """Caption accuracy on both validation sets of the shapes."""
    args = context.args
    counts, options = (args.num_prompts, args.best_of, args.seed), {"chunk": args.chunk} | context.sampling
    splits = ("val", "new_pairs")
    return {split: caption_accuracy(context.model, split, *counts, **options)[0] for split in splits}


def dvae_metrics(context: EvalContext) -> dict[str, Any]:
    """Reconstructions by hard codes."""
    return reconstruction.run(context.model.dvae, context.pixels(), context.lpips)


def transformer_metrics(context: EvalContext) -> dict[str, Any]:
    """Nats per token; and the evidence lower bound, where the image tokenizer has a likelihood."""
    model, layout = context.model, context.model.transformer.layout

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, batch in context.batches():
            ids = [model.text.encode(caption) for caption in sample_captions(batch, context.args.seed)]
            yield pixels, layout.pad_text(ids, truncate=True).to(model.device)

    packed = (layout.pack(text, model.dvae.encode(pixels)) for pixels, text in pairs())
    report = nats_per_token(model.transformer, packed)
    if isinstance(model.dvae, DVAE):
        report["bound"] = bits_per_dim(model.dvae, model.transformer, pairs(), context.args.seed)
    return report


@torch.no_grad()
def clip_metrics(context: EvalContext) -> dict[str, Any]:
    """Retrieval among all validation captions; with --classes also zero-shot and typographic attack."""
    clip, args = context.clip, context.args
    captions, image_vectors, caption_vectors = [], [], []
    for pixels, batch in context.batches():
        captions += batch.captions
        image_vectors.append(clip.embed_images(pixels).cpu())
        caption_vectors.append(clip.embed_captions([text for own in batch.captions for text in own]).cpu())
    owners = [image for image, own in enumerate(captions) for _ in own]
    found = retrieval(torch.cat(image_vectors), torch.cat(caption_vectors), owners)
    report = {"images": len(captions), "captions": len(owners), "retrieval": found}
    if context.classes is None:
        return report
    vectors = class_vectors(clip, context.classes, args.templates)
    ranked = [(zero_shot(clip, pixels, vectors), labels) for pixels, labels in context.labeled()]
    predictions, labels = (torch.cat(tensors).cpu() for tensors in zip(*ranked, strict=True))
    facts = {"images": len(labels), "templates": list(args.templates)}
    report["zero_shot"] = accuracy(predictions, labels) | facts
    attack = typographic_attack(clip, context.labeled(), context.classes, vectors, args.seed)
    return report | {"typographic_attack": attack}


def image_metrics(context: EvalContext) -> dict[str, Any]:
    """FID and IS of the best candidates for validation captions against validation images; CLIP score."""
    args, extractor, clip_means = context.args, context.extractor, MeanMetric()
    n = args.best_of if context.model.scorer else 1

    def generated() -> Iterator[Tensor]:
        for generations in generate(context, n, keep=1):
            pixels = to_tensor([one.images[0] for one in generations]).to(context.model.device)
            if context.clip:
                clip_means.add(clip_scores(context.clip, pixels, [one.prompt for one in generations]))
            yield pixels

    real, real_hash = _real_stats(context, args.blur_radii)
    stats = fid.extract_stats(extractor, generated(), args.blur_radii)
    radius = args.blur_radii[0]
    report: dict[str, Any] = {
        "num_generated": stats[radius].count,
        "num_real": int(real[radius].count),
        "best_of": n,
        "stats": real_hash,
        "blur": fid.compare(stats, real, extractor.metric, args.seed),
    }
    if context.clip:
        report |= clip_means.values()
        report["same_clip_as_ranker"] = n > 1 and context.clip is context.model.scorer
    return report


def rerank_metrics(context: EvalContext) -> dict[str, Any]:
    """Of the best of N: mean score, accuracy by the judge of the shapes, FID."""
    size, extractor = context.args.best_of, context.extractor
    scores, correct = [], []
    stats = {n: fid.FeatureStats() for n in sizes(size)}
    for generation in (one for group in generate(context, size, keep=size) for one in group):
        order = np.argsort(generation.candidates)
        scores.append(np.array(generation.scores)[order])
        pixels = to_tensor([generation.images[i] for i in order])
        if context.args.data.path == "shapes":
            correct.append(matches_caption(pixels, [generation.prompt] * size))
        if extractor:
            for n, one in stats.items():
                best = int(scores[-1][:n].argmax())
                one.add(*extractor(pixels[[best]].to(context.model.device)))
    curves = {"score": best_of_n(np.stack(scores))}
    if correct:
        curves["accuracy"] = best_of_n(np.stack(scores), np.stack(correct))
    if extractor:
        real, _ = _real_stats(context, (0,))
        for n, one in stats.items():
            metrics = fid.compare({0: one}, real, extractor.metric, context.args.seed)["0"]
            for name, value in metrics.items():
                curves.setdefault(name, {})[n] = value
    return {"captions": len(scores), "candidates": size, **curves}


def _real_stats(context: EvalContext, radii: tuple[float, ...]) -> tuple[dict, str]:
    facts = context.facts() | {"resize": RESIZE}
    folder = context.args.stats_dir
    return fid.cached_reference_stats(context.extractor, context.pixels, facts, folder, radii)


def generate(context: EvalContext, best_of: int, keep: int) -> Iterator[list[Generation]]:
    """The best `keep` of `best_of` candidates for each prompt, in groups so that memory stays bounded."""
    args, model = context.args, context.model.to_precision("auto")
    prompts, group = context.prompts(), max(1, args.batch // keep)
    for start in range(0, len(prompts), group):
        part, options = prompts[start : start + group], context.sampling | {"truncate": True}
        generations = model.generate(part, keep, best_of, args.seed, **options)
        if len(generations) < len(part) or any(one.interrupted for one in generations):
            raise KeyboardInterrupt
        yield generations


METRICS: dict[str, Callable[[EvalContext], dict[str, Any]]] = {
    "shapes": shapes_metrics,
    "dvae": dvae_metrics,
    "transformer": transformer_metrics,
    "clip": clip_metrics,
    "images": image_metrics,
    "rerank": rerank_metrics,
}
