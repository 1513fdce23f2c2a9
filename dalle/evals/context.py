"""Evaluation context: the model, validation pairs, CLIP, feature extractor and provenance."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from dalle.config import to_dict
from dalle.data import open_dataset, sample_captions
from dalle.evals.config import EvalConfig
from dalle.evals.networks import LPIPS, CLIPFeatures, Extractor, Inception
from dalle.hub.registry import weights_hash
from dalle.io.text import VISIBLE, read_text
from dalle.pipelines.glide import GLIDE
from dalle.pipelines.pipeline import Pipeline
from dalle.types import Embedder, ImageTextBatch

RESIZE = "shorter side by Pillow's Lanczos, then the middle square"


def read_classes(path: Path) -> list[str]:
    """Class names, one per line; ValueError for no such file, fewer than two, or one twice."""
    lines = read_text(path, "a text file of a class name per line").split("\n")
    names = [line.strip() for line in lines if VISIBLE.search(line)]
    if len(names) < 2 or len(set(map(_normalized, names))) < len(names):
        raise ValueError(f"{path} must have two or more class names, one per line, none twice")
    return names


def _normalized(name: str) -> str:
    return " ".join(name.lower().split())


class EvalContext:
    """A model with the validation pairs and networks that measure it; `clip` in place of its own CLIP."""

    def __init__(self, args: EvalConfig, model: Pipeline, clip: Embedder | None = None):
        self.args, self.model = args, model
        self.clip = clip or (model.scorer if isinstance(model.scorer, Embedder) else None)
        self.data = replace(args.data, resolution=model.image_size)
        self.dataset = open_dataset(self.data, "val")
        self.lpips = LPIPS(args.lpips_backbone, model.device) if args.lpips_backbone else None
        self.classes = read_classes(args.classes) if args.classes else None

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of the model's `generate`."""
        if isinstance(self.model, GLIDE):
            return asdict(self.args.diffusion)
        return {"temperature": self.args.temperature}

    @cached_property
    def extractor(self) -> Extractor | None:
        """Features for FID and IS, or None without --feature-extractor."""
        name = self.args.feature_extractor
        if name == "clip":
            return CLIPFeatures(self.clip, weights_hash(self.clip.model))
        return Inception(Path(name), self.model.device) if name else None

    def batches(self, count: int | None = None) -> Iterator[tuple[Tensor, ImageTextBatch]]:
        """The first `count` usable validation pairs (by default --num-samples); ValueError for none.

        Pixels (B, 3, R, R) are on the model's device.
        """
        index, found, count, size = 0, 0, count or self.args.num_samples, self.dataset.size or 2**62
        while found < count and index < size:
            end = min(index + self.args.batch, index + count - found, size)
            batch = self.dataset.load([(0, i) for i in range(index, end)])
            index, found = end, found + len(batch.samples)
            if batch.samples:
                yield torch.from_numpy(batch.pixels).to(self.model.device), batch
        if not found:
            raise ValueError(f"no usable validation pair in {self.data.path}; scripts/check_data.py says why")

    def pixels(self) -> Iterator[Tensor]:
        """Validation images."""
        return (pixels for pixels, _ in self.batches())

    def prompts(self) -> list[str]:
        """One caption of each of the first --num-prompts pairs; the seed chooses among captions."""
        batches = [batch for _, batch in self.batches(self.args.num_prompts)]
        return [caption for batch in batches for caption in sample_captions(batch, self.args.seed)]

    def labeled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, R, R) and labels int64 (B,) of the pairs whose caption names a class."""
        numbers, found = {_normalized(name): i for i, name in enumerate(self.classes)}, False
        for pixels, batch in self.batches():
            named = [[numbers[c] for c in map(_normalized, one) if c in numbers] for one in batch.captions]
            if kept := [i for i, labels in enumerate(named) if labels]:
                found = True
                yield pixels[kept], torch.tensor([named[i][0] for i in kept])
        if not found:
            raise ValueError(f"no caption of {self.data.path} is a class, such as {self.classes[0]!r}")

    def facts(self) -> dict[str, Any]:
        """What identifies the validation images."""
        return {
            "path": self.data.path,
            "hash": self.dataset.hash,
            "max_pairs": self.args.num_samples,
            "resolution": self.data.resolution,
            "filters": to_dict(self.data.filters),
        }

    def provenance(self) -> dict[str, Any]:
        """Hashes of weights and data, sizes and versions that the numbers depend on."""
        model, extractor = self.model, self.extractor
        hashes = {
            **{name: weights_hash(part) for name, part in model.parts.items()},
            "text": model.text.hash,
            "clip": self.clip and weights_hash(self.clip.model),
            "feature_extractor": extractor and extractor.hash,
            "lpips": self.lpips and self.lpips.hash,
        }
        return {
            "hashes": {name: value for name, value in hashes.items() if value},
            "data": self.facts(),
            "resize": {"images": RESIZE} | ({"features": extractor.resize} if extractor else {}),
            "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
        }
