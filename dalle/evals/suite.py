"""Metrics of scripts/evaluate.py, one function each: EvalContext -> report."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.data import sample_captions
from dalle.dvae import DVAE
from dalle.evals import image_features, reconstruction, typographic_attack, zero_shot
from dalle.evals.best_of_n import best_of_n, sizes
from dalle.evals.clip_score import clip_scores
from dalle.evals.context import RESIZE, EvalContext
from dalle.evals.likelihood import bits_per_dim, nats_per_token
from dalle.evals.retrieval import retrieval
from dalle.evals.running_mean import MeanMetric
from dalle.evals.shapes_accuracy import caption_accuracy
from dalle.io.images import to_tensor
from dalle.pipelines.generation import Generation
from dalle.shapes.judge import matches_caption


def shapes_metrics(context: EvalContext) -> dict[str, Any]:
    """Caption accuracy on both validation sets of the shapes."""
    args = context.args
    options = (args.num_prompts, args.best_of, args.chunk, args.seed, args.temperature)
    splits = ("held_out", "new_pairs")
    return {split: caption_accuracy(context.model, split, *options)[0] for split in splits}


def dvae_metrics(context: EvalContext) -> dict[str, Any]:
    """Reconstructions by hard codes."""
    return reconstruction.run(context.model.dvae, context.pixels(), context.lpips)


def transformer_metrics(context: EvalContext) -> dict[str, Any]:
    """Nats per token; and the evidence lower bound, where the image tokenizer has a likelihood."""
    model, layout = context.model, context.model.transformer.layout

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in context.validation.batches():
            ids = [model.text.encode(caption) for caption in sample_captions(batch, context.args.seed)]
            text_tokens = layout.pad_text(ids, truncate=True).to(model.device)
            yield torch.from_numpy(batch.pixels).to(model.device), text_tokens

    report = nats_per_token(
        model.transformer, (layout.pack(text, model.dvae.encode(pixels)) for pixels, text in pairs())
    )
    if isinstance(model.dvae, DVAE):
        report["bound"] = bits_per_dim(model.dvae, model.transformer, pairs(), context.args.seed)
    return report


def clip_metrics(context: EvalContext) -> dict[str, Any]:
    """Retrieval among all validation captions; with --classes also zero-shot and typographic attack."""
    clip, args, device = context.require_clip(), context.args, context.model.device
    images, captions, owners = [], [], []
    with torch.no_grad():
        for batch in context.validation.batches():
            owners += [sum(map(len, images)) + i for i, texts in enumerate(batch.captions) for _ in texts]
            images.append(clip.embed_images(torch.from_numpy(batch.pixels).to(device)).cpu())
            captions.append(clip.embed_captions([text for texts in batch.captions for text in texts]).cpu())
    report = {"images": sum(map(len, images)), "captions": len(owners)}
    report["retrieval"] = retrieval(torch.cat(images), torch.cat(captions), owners)
    if context.classes is None:
        return report
    vectors = zero_shot.class_vectors(clip, context.classes, args.templates)

    def labeled() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in context.validation.labeled(context.classes):
            yield pixels.to(device), labels

    ranked = [(zero_shot.predictions(clip, pixels, vectors).cpu(), labels) for pixels, labels in labeled()]
    predictions, labels = (torch.cat(tensors) for tensors in zip(*ranked, strict=True))
    accuracy = zero_shot.accuracy(predictions, labels)
    report["zero_shot"] = accuracy | {"images": len(labels), "templates": list(args.templates)}
    attack = typographic_attack.run(clip, labeled(), context.classes, vectors, args.seed)
    return report | {"typographic_attack": attack}


def image_metrics(context: EvalContext) -> dict[str, Any]:
    """FID and IS of the best candidates for validation captions against validation images; CLIP score."""
    args, extractor, clip_means = context.args, context.require_extractor(), MeanMetric()
    n = args.best_of if context.model.scorer else 1

    def generated() -> Iterator[Tensor]:
        for captions, generations in generate(context, n, keep=1):
            pixels = to_tensor([one.images[0] for one in generations]).to(context.model.device)
            if context.clip:
                clip_means.add(clip_scores(context.clip, pixels, captions))
            yield pixels

    real, real_hash = _real_stats(context, args.blur_radii)
    stats = image_features.extract_stats(extractor, generated(), args.blur_radii)
    report: dict[str, Any] = {
        "num_generated": next(iter(stats.values())).moments.count,
        "num_real": next(iter(real.values())).count,
        "best_of": n,
        "stats": real_hash,
        "blur": image_features.compare(stats, real, extractor.metric, args.seed),
    }
    if context.clip:
        report |= clip_means.values()
        report["same_clip_as_ranker"] = n > 1 and context.clip is context.model.scorer
    return report


def rerank_metrics(context: EvalContext) -> dict[str, Any]:
    """Of the best of N: mean score, accuracy by the judge of the shapes, FID."""
    size, extractor = context.args.best_of, context.extractor
    scores, correct = [], []
    stats = {n: image_features.ImageStats() for n in sizes(size)}
    for captions, generations in generate(context, size, keep=size):
        for caption, generation in zip(captions, generations, strict=True):
            order = np.argsort(generation.candidates)
            scores.append(np.array(generation.scores)[order])
            pixels = to_tensor([generation.images[i] for i in order])
            if context.args.data.path == "shapes":
                correct.append(matches_caption(pixels, [caption] * size))
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
            metrics = image_features.compare({0: one}, real, extractor.metric, context.args.seed)["0"]
            for name, value in metrics.items():
                curves.setdefault(name, {})[n] = value
    by_name = {name: {str(n): value for n, value in curve.items()} for name, curve in curves.items()}
    return {"captions": len(scores), "candidates": size, **by_name}


def _real_stats(context: EvalContext, radii: tuple[float, ...]) -> tuple[dict, str]:
    data = context.validation.provenance() | {"resize": RESIZE}
    extractor, folder = context.require_extractor(), context.args.stats_dir
    return image_features.cached_reference_stats(extractor, context.pixels, data, folder, radii)


def generate(context: EvalContext, best_of: int, keep: int) -> Iterator[tuple[list[str], list[Generation]]]:
    """Captions with the best `keep` of `best_of` candidates, in groups so that memory stays bounded."""
    args, model = context.args, context.model.to_precision("auto")
    group = max(1, args.batch // keep)
    for start in range(0, len(context.prompts), group):
        captions = context.prompts[start : start + group]
        options = {"temperature": args.temperature, "truncate": True}
        generations = model.generate(captions, keep, best_of, args.seed, **options)
        if len(generations) < len(captions) or any(one.interrupted for one in generations):
            raise KeyboardInterrupt
        yield captions, generations


METRICS: dict[str, Callable[[EvalContext], dict[str, Any]]] = {
    "shapes": shapes_metrics,
    "dvae": dvae_metrics,
    "transformer": transformer_metrics,
    "clip": clip_metrics,
    "images": image_metrics,
    "rerank": rerank_metrics,
}
