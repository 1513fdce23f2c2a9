"""Caption accuracy: the fraction of images that show their caption, by the judge of the shapes.

The judge reads pixels and takes no part in the ranking.

    C captions, n candidates of each
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dalle.pipelines.dalle import DALLE
from dalle.pipelines.pipeline import Pipeline
from dalle.shapes.dataset import ShapesDataset, captions, change_one_attribute, parse_caption
from dalle.shapes.judge import matches_caption


@dataclass(frozen=True)
class ShapesSamples:
    """Candidates (C, n, 3, R, R) for captions, and the one of each that CLIP ranks first."""

    captions: list[str]
    pixels: Tensor
    best: list[int]
    correct: np.ndarray | None = None
    """Which candidates show their caption: bool (C, n)."""

    def first(self) -> Tensor:
        """Candidate 0 of each caption (C, 3, R, R)."""
        return self.pixels[:, 0]

    def ranked(self) -> Tensor:
        """The candidate ranked first of each caption (C, 3, R, R)."""
        return self.pixels[range(len(self.best)), self.best]


def caption_accuracy(
    model: Pipeline, split: str, count: int, best_of: int, seed: int, chunk: int = 512, **sampling
) -> tuple[dict[str, float], ShapesSamples]:
    """Fraction of images that the judge accepts, and the samples.

    acc_real: true images; acc_mismatched: true images against a caption that differs in one attribute;
    acc_reconstruction: true images through hard codes, of a DALL-E; acc_first: the first sample;
    acc_best_of_n: the one ranked first; acc_random_of_n, acc_oracle_of_n: a random one, any of the n;
    acc_chance: first samples against other images' captions. `sampling` is of the model's `generate`.
    """
    dataset, rng = ShapesDataset(model.image_size, seed, split), np.random.default_rng(seed)
    scenes = [dataset.scene(index) for index in range(count)]
    texts = [_one_wording(scene, rng) for scene in scenes]
    mismatched = [_one_wording(change_one_attribute(scene, rng), rng) for scene in scenes]
    pixels = torch.from_numpy(dataset.pixels(range(count)))
    samples = generate_samples(model, texts, best_of, chunk, seed, **sampling)
    repeated = [text for text in texts for _ in range(best_of)]
    correct = matches_caption(samples.pixels.flatten(0, 1), repeated).reshape(count, best_of)
    scores = {
        "acc_real": matches_caption(pixels, texts).mean(),
        "acc_mismatched": matches_caption(pixels, mismatched).mean(),
    }
    if isinstance(model, DALLE):
        with torch.no_grad():
            tokens = [model.dvae.encode(part.to(model.device)) for part in pixels.split(chunk)]
            decoded = torch.cat([model.decode(part).cpu() for part in tokens])
        scores["acc_reconstruction"] = matches_caption(decoded, texts).mean()
    scores |= {
        "acc_first": correct[:, 0].mean(),
        f"acc_best_of_{best_of}": correct[range(count), samples.best].mean(),
        f"acc_random_of_{best_of}": correct[range(count), rng.integers(best_of, size=count)].mean(),
        f"acc_oracle_of_{best_of}": correct.any(axis=1).mean(),
        "acc_chance": matches_caption(samples.first(), np.roll(texts, 1).tolist()).mean(),
    }
    scores = {name: float(value) for name, value in scores.items()}
    return scores, replace(samples, correct=correct)


def pair_accuracy(samples: Sequence[ShapesSamples]) -> dict[str, dict[str, float]]:
    """Fraction of right images by color and by shape, over all candidates of the captions with that pair."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in samples:
        for caption, correct in zip(one.captions, one.correct, strict=True):
            for thing in parse_caption(caption).things:
                found.setdefault(thing.color, {}).setdefault(thing.shape, []).append(float(correct.mean()))
    return {
        color: {shape: float(np.mean(values)) for shape, values in shapes.items()}
        for color, shapes in found.items()
    }


def _one_wording(scene, rng: np.random.Generator) -> str:
    wordings = captions(scene)
    return wordings[rng.integers(len(wordings))]


def generate_samples(
    model: Pipeline, texts: Sequence[str], best_of: int, batch: int, seed: int, **sampling
) -> ShapesSamples:
    """`best_of` candidates of every caption, several captions at once, ranked by the model's scorer."""
    model = model.to_precision("auto")
    sampling["batch_size"] = sampling.get("batch_size") or min(batch, len(texts) * best_of)
    with tqdm(total=len(texts) * best_of, desc="sampling", unit="image", disable=None) as bar:
        for step in model.steps(texts, best_of, best_of, seed, model.Sampling(**sampling)):
            bar.update(step.seen - bar.n)
    pixels = [torch.stack([c[3] for c in sorted(top.best, key=lambda c: c[1])]) for top in step.top]
    return ShapesSamples(list(texts), torch.stack(pixels), [top.best[0][1] for top in step.top])
