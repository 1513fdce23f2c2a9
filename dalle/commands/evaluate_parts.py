"""The parts of an evaluation over held-out pairs: each brings a model and pairs to what dalle/evals measures.

B pairs of a batch
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import torch
from torch import Tensor

from dalle.commands.evaluate_data import HeldOut, read_classes
from dalle.data import sample_captions
from dalle.evals import (
    best_of_n,
    clip_score,
    elbo,
    image_features,
    likelihood,
    reconstruction,
    retrieval,
    typographic_attack,
    zero_shot,
)
from dalle.evals.inception import HOW, Inception
from dalle.evals.lpips import LPIPS
from dalle.evals.running_mean import MeanMetric
from dalle.hub.registry import weights_hash
from dalle.io.images import to_tensor
from dalle.pipelines.dalle import DALLE
from dalle.shapes.judge import matches_caption
from dalle.types import Embedder

if TYPE_CHECKING:
    from dalle.commands.evaluate import EvaluateArgs

RESIZE = "shorter side by Pillow's Lanczos, then the middle square"


class Bench:
    """A model, with the pairs and tools to measure it by. What cannot be opened is refused here.

    Args:
        run: what is asked for.
        model: the model.
        device: where it is.
        clip: measures in place of the model's own.

    Raises:
        ValueError: no data, or a part without the tool that it needs.
    """

    def __init__(self, run: "EvaluateArgs", model: DALLE, device: torch.device, clip: Embedder | None = None):
        self.run, self.model, self.device = run, model, device
        layout = model.transformer.layout
        if layout.rows != layout.columns:
            raise ValueError(
                f"held-out images are square, the model's grid is {layout.rows} x {layout.columns}"
            )
        self.held_out = HeldOut(
            run.data, layout.rows * model.dvae.downsample_factor, run.pairs, run.batch, run.seed
        )
        self.clip = clip or (model.scorer if isinstance(model.scorer, Embedder) else None)
        self.extractor = self._extractor() if "images" in run.parts or run.extractor else None
        self.lpips = LPIPS(run.lpips_backbone, run.lpips_weights, device) if run.lpips_weights else None
        self.classes = read_classes(run.classes) if run.classes else None
        if "clip" in run.parts:
            self.need_clip()

    def need_clip(self) -> Embedder:
        """The CLIP that measures; ValueError without one."""
        if self.clip is None:
            raise ValueError(f"{self.run.model} has no CLIP to measure with; give OpenAI's by --clip FILE")
        return self.clip

    def _extractor(self) -> image_features.Extractor:
        if self.run.extractor is None:
            raise ValueError(HOW)
        if self.run.extractor == "clip":
            return image_features.CLIPFeatures(self.need_clip(), weights_hash(self.clip.model))
        return Inception(Path(self.run.extractor), self.device)

    def pixels(self) -> Iterator[Tensor]:
        """Held-out images (B, 3, R, R), on the model's device."""
        for batch in self.held_out.batches():
            yield torch.from_numpy(batch.pixels).to(self.device)

    @cached_property
    def prompts(self) -> list[str]:
        """A caption of each of the first held-out pairs, to draw for."""
        return self.held_out.prompts(self.run.captions)

    def facts(self) -> dict[str, Any]:
        """What the numbers rest on: weights, data, sizes, seeds, versions."""
        model = self.model
        weights = {"dvae": weights_hash(model.dvae), "transformer": weights_hash(model.transformer)}
        weights |= {"text": model.text.hash}
        weights |= {"clip": weights_hash(self.clip.model)} if self.clip else {}
        weights |= {"extractor": self.extractor.hash} if self.extractor else {}
        weights |= {"lpips": self.lpips.hash} if self.lpips else {}
        resize = {"images": RESIZE} | ({"features": self.extractor.resize} if self.extractor else {})
        versions = {"torch": torch.__version__, "pillow": PIL.__version__}
        return {"hashes": weights, "data": self.held_out.facts(), "resize": resize, "versions": versions}


def dvae_part(bench: Bench) -> dict[str, Any]:
    """Reconstructions by hard codes."""
    counted = Counted(bench.pixels())
    return reconstruction.run(bench.model.dvae, counted, bench.lpips) | {"images": counted.count}


def transformer_part(bench: Bench) -> dict[str, Any]:
    """Nats per token; and the bound, where the image tokenizer has a likelihood."""
    model = bench.model

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in bench.held_out.batches():
            ids = [model.text.encode(caption) for caption in sample_captions(batch, bench.run.seed)]
            text = model.transformer.layout.pad_text(ids, truncate=True).to(bench.device)
            yield torch.from_numpy(batch.pixels).to(bench.device), text

    def streams() -> Iterator[Tensor]:
        for pixels, text in pairs():
            yield model.transformer.layout.pack(text, model.dvae.encode(pixels))

    counted = Counted(streams())
    report = likelihood.run(model.transformer, counted) | {"pairs": counted.count}
    if isinstance(model.dvae, elbo.DVAE):
        report["bound"] = elbo.run(model.dvae, model.transformer, pairs(), bench.run.seed)
    return report


def clip_part(bench: Bench) -> dict[str, Any]:
    """Retrieval among all captions of the held-out pairs; with --classes also zero-shot and written words."""
    clip, seed = bench.need_clip(), bench.run.seed
    images, texts, owners = [], [], []
    with torch.no_grad():
        for batch in bench.held_out.batches():
            first = sum(map(len, images))
            images.append(clip.embed_images(torch.from_numpy(batch.pixels).to(bench.device)).cpu())
            owners += [first + i for i, captions in enumerate(batch.captions) for _ in captions]
            texts.append(clip.embed_captions([one for captions in batch.captions for one in captions]).cpu())
    report = {"images": sum(map(len, images)), "captions": len(owners)}
    report |= {"retrieval": retrieval.retrieval(torch.cat(images), torch.cat(texts), owners)}
    if bench.classes is None:
        return report
    vectors = zero_shot.class_vectors(clip, bench.classes, bench.run.templates)

    def labelled() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in bench.held_out.labelled(bench.classes):
            yield pixels.to(bench.device), labels

    ranked, labels = [], []
    for pixels, right in labelled():
        ranked.append(zero_shot.predictions(clip, pixels, vectors).cpu())
        labels.append(right)
    report["zero_shot"] = zero_shot.accuracy(torch.cat(ranked), torch.cat(labels)) | {
        "images": sum(map(len, labels)),
        "templates": list(bench.run.templates),
    }
    report["written_words"] = typographic_attack.run(clip, labelled(), bench.classes, vectors, seed)
    return report


def images_part(bench: Bench) -> dict[str, Any]:
    """The best of the candidates for held-out captions, beside held-out images."""
    run, fit = bench.run, MeanMetric()
    n = run.best_of if bench.model.scorer else 1

    def drawn() -> Iterator[Tensor]:
        for captions, generations in _draw(bench, n, keep=1):
            pixels = to_tensor([one.images[0] for one in generations]).to(bench.device)
            if bench.clip:
                fit.add(clip_score.clip_scores(bench.clip, pixels, captions))
            yield pixels

    facts = bench.held_out.facts() | {"resize": RESIZE}
    real, real_hash = image_features.reference(bench.extractor, bench.pixels, facts, run.statistics, run.blur)
    found = image_features.measure(bench.extractor, drawn(), run.blur)
    report: dict[str, Any] = {
        "drawn": next(iter(found.values())).moments.count,
        "real": next(iter(real.values())).count,
        "best_of": n,
        "space": "CLIP" if run.extractor == "clip" else "Inception",
        "statistics": real_hash,
        "blur": image_features.compare(found, real, run.seed),
    }
    if bench.clip:
        measured_by_ranker = n > 1 and bench.clip is bench.model.scorer
        report |= fit.values() | {"measured_by_the_clip_that_ranked": measured_by_ranker}
    return report


def rerank_part(bench: Bench) -> dict[str, Any]:
    """Of the best of N: the mean score, the share that the judge finds right (shapes), the distance of those kept."""
    m = bench.run.best_of
    scores, right, kept = [], [], {n: image_features.Measured() for n in best_of_n.sizes(m)}
    for captions, generations in _draw(bench, m, keep=m):
        for caption, generation in zip(captions, generations, strict=True):
            order = np.argsort(generation.candidates)
            scores.append(np.array(generation.scores)[order])
            pixels = to_tensor([generation.images[i] for i in order])
            if bench.run.data.path == "shapes":
                right.append(matches_caption(pixels, [caption] * m))
            for n, measured in kept.items() if bench.extractor else ():
                best = int(scores[-1][:n].argmax())
                measured.add(*bench.extractor(pixels[[best]].to(bench.device)))
    table = np.stack(scores)
    report: dict[str, Any] = {
        "captions": len(table),
        "candidates": m,
        "score": _named(best_of_n.best_of_n(table)),
    }
    if right:
        report["right"] = _named(best_of_n.best_of_n(table, np.stack(right)))
    if bench.extractor:
        facts = bench.held_out.facts() | {"resize": RESIZE}
        real, _ = image_features.reference(bench.extractor, bench.pixels, facts, bench.run.statistics, (0,))
        for n, measured in kept.items():
            for name, value in image_features.compare({0: measured}, real, bench.run.seed)["0"].items():
                report.setdefault(name, {})[str(n)] = value
    return report


def _draw(bench: Bench, n: int, keep: int) -> Iterator[tuple[list[str], list]]:
    """Captions and what is drawn for them, a few at a time."""
    run, model = bench.run, bench.model.to_precision("auto")
    together = max(1, run.batch // keep)  # so that memory does not grow with the candidates that are kept
    for start in range(0, len(bench.prompts), together):
        captions = bench.prompts[start : start + together]
        found = model.generate(captions, keep, n, run.seed, run.temperature, truncate=True)
        if len(found) < len(captions) or any(one.interrupted for one in found):
            raise KeyboardInterrupt
        yield captions, found


def _named(curve: dict[int, float]) -> dict[str, float]:
    return {str(n): value for n, value in curve.items()}


class Counted:
    """Batches as they come, and how many samples were in them."""

    def __init__(self, batches: Iterator[Tensor]):
        self._batches, self.count = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._batches:
            self.count += len(batch)
            yield batch


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "dvae": dvae_part,
    "transformer": transformer_part,
    "clip": clip_part,
    "images": images_part,
    "rerank": rerank_part,
}
