"""Evaluation context: the model, validation pairs, CLIP, feature extractor and provenance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor

from dalle.config import to_dict
from dalle.data import DataConfig, open_dataset, sample_captions
from dalle.evals.config import EvalConfig
from dalle.evals.networks import INCEPTION_FILE, LPIPS, CLIPFeatures, Extractor, Inception
from dalle.hub.registry import weights_hash
from dalle.pipelines.dalle import DALLE
from dalle.types import Embedder, ImageTextBatch

RESIZE = "shorter side by Pillow's Lanczos, then the middle square"


class ValidationSet:
    """The first usable validation pairs of a dataset, at most `count`; the seed chooses among captions."""

    def __init__(self, data: DataConfig, resolution: int, count: int, batch: int, seed: int):
        self.data = replace(data, resolution=resolution)
        self.count, self.batch, self.seed = count, batch, seed
        self.dataset = open_dataset(self.data, "held_out")

    def batches(self, count: int | None = None) -> Iterator[ImageTextBatch]:
        """The first `count` usable pairs (by default `self.count`); ValueError where there is none."""
        index, found, count, size = 0, 0, count or self.count, self.dataset.size
        while found < count and (size is None or index < size):
            end = min(index + self.batch, index + count - found, size or 2**62)
            batch = self.dataset.load([(0, i) for i in range(index, end)])
            index, found = end, found + len(batch.samples)
            if batch.samples:
                yield batch
        if not found:
            raise ValueError(f"no usable validation pair in {self.data.path}; scripts/check_data.py says why")

    def prompts(self, count: int) -> list[str]:
        """One caption of each of the first pairs."""
        return [caption for batch in self.batches(count) for caption in sample_captions(batch, self.seed)]

    def labeled(self, classes: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels (B, 3, R, R) and labels int64 (B,) of the pairs whose caption names a class."""
        numbers, found = {_normalized(name): i for i, name in enumerate(classes)}, False
        for batch in self.batches():
            named = [[numbers[c] for c in map(_normalized, one) if c in numbers] for one in batch.captions]
            if any(named):
                found = True
                kept = [i for i, labels in enumerate(named) if labels]
                yield torch.from_numpy(batch.pixels[kept]), torch.tensor([named[i][0] for i in kept])
        if not found:
            what = f"no validation caption of {self.data.path} is the name of a class"
            raise ValueError(f"{what}, such as {classes[0]!r}; each caption must be a class")

    def provenance(self) -> dict[str, Any]:
        """What identifies the images."""
        return {
            "path": self.data.path,
            "hash": self.dataset.hash,
            "max_pairs": self.count,
            "resolution": self.data.resolution,
            "filters": to_dict(self.data.filters),
        }


def read_classes(path: Path) -> list[str]:
    """Class names, one per line; ValueError for no such file, fewer than two, or one twice."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); give a text file of a class name per line") from None
    if len(names) < 2 or len(set(map(_normalized, names))) < len(names):
        raise ValueError(f"{path} must have two or more class names, one per line, none twice")
    return names


def _normalized(name: str) -> str:
    return " ".join(name.lower().split())


@dataclass
class EvalContext:
    """A model with the data and networks that measure it."""

    args: EvalConfig
    model: DALLE
    clip: Embedder | None = None  # measures in place of the model's own CLIP

    def __post_init__(self):
        layout, args = self.model.transformer.layout, self.args
        if layout.rows != layout.columns:
            raise ValueError(f"images are square, the model's grid is {layout.rows} x {layout.columns}")
        resolution = layout.rows * self.model.dvae.downsample_factor
        self.validation = ValidationSet(args.data, resolution, args.num_samples, args.batch, args.seed)
        if self.clip is None and isinstance(self.model.scorer, Embedder):
            self.clip = self.model.scorer
        self.lpips = LPIPS(args.lpips_backbone, self.model.device) if args.lpips_backbone else None
        self.classes = read_classes(args.classes) if args.classes else None

    @cached_property
    def extractor(self) -> Extractor | None:
        """Features for FID and IS, or None without --feature-extractor."""
        name = self.args.feature_extractor
        if name == "clip":
            return CLIPFeatures(self.require_clip(), weights_hash(self.clip.model))
        return Inception(Path(name), self.model.device) if name else None

    def require_clip(self) -> Embedder:
        """The CLIP that measures; ValueError without one."""
        if self.clip is None:
            raise ValueError("the model has no CLIP to measure with; give OpenAI's by --clip FILE")
        return self.clip

    def require_extractor(self) -> Extractor:
        """The feature extractor; ValueError without one."""
        if self.extractor is None:
            raise ValueError(INCEPTION_FILE)
        return self.extractor

    @cached_property
    def prompts(self) -> list[str]:
        """A caption of each of the first validation pairs, to sample images for."""
        return self.validation.prompts(self.args.num_prompts)

    def pixels(self) -> Iterator[Tensor]:
        """Validation images (B, 3, R, R) on the model's device."""
        for batch in self.validation.batches():
            yield torch.from_numpy(batch.pixels).to(self.model.device)

    def provenance(self) -> dict[str, Any]:
        """Hashes of weights and data, sizes and versions that the numbers depend on."""
        model, extractor = self.model, self.extractor
        hashes = {
            "dvae": weights_hash(model.dvae),
            "transformer": weights_hash(model.transformer),
            "text": model.text.hash,
            "clip": self.clip and weights_hash(self.clip.model),
            "feature_extractor": extractor and extractor.hash,
            "lpips": self.lpips and self.lpips.hash,
        }
        return {
            "hashes": {name: value for name, value in hashes.items() if value},
            "data": self.validation.provenance(),
            "resize": {"images": RESIZE} | ({"features": extractor.resize} if extractor else {}),
            "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
        }
