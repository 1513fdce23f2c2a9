"""What the pipelines share: `generate`'s loop, checks of its arguments, devices, model directories."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from dalle.clip import CLIP
from dalle.hub.hub import push_to_hub, resolve_source
from dalle.hub.model_card import Report
from dalle.hub.registry import LoadedModel, weights_hash, write_model_directory
from dalle.io.files import read_config
from dalle.io.text import VISIBLE
from dalle.pipelines.generation import Generation
from dalle.sampling import MAX_COUNT, whole_numbers
from dalle.text import BPETokenizer, text_tokenizer_from_dict
from dalle.train.precision import copy_to_device, resolve_device
from dalle.types import Scorer

PIPELINES = {"dvae": "DALLE", "transformer": "DALLE", "base": "GLIDE", "upsampler": "GLIDE"}
"""The pipeline that a part of a model directory belongs to."""


class Pipeline:
    """A text tokenizer, a scorer, and models that generate images, which a subclass joins."""

    Sampling: ClassVar[type]
    """Settings of `generate`."""
    steps: Callable[..., Iterator[Any]]
    """The loop behind `generate`, of a subclass."""
    PARTS: ClassVar[tuple[str, ...]]
    """Names of the models: attributes, and parts of a model directory."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ("clip",)
    """Parts that may be missing."""
    text: BPETokenizer
    scorer: Scorer | None
    precision = "fp32"
    """Of the models' matrices, as sample records name it."""
    _hash: str | None = None  # of the weights before rounding

    push_to_hub = push_to_hub

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The models that there are, by name."""
        models = {name: getattr(self, name) for name in self.PARTS}
        return {name: model for name, model in models.items() if model is not None}

    @property
    def hash(self) -> str:
        """Hashes of the weights of each model and, if the scorer is ours, its `CLIP`."""
        clip = getattr(self.scorer, "model", None)
        models = [*self.parts.values(), *([clip] if isinstance(clip, CLIP) else [])]
        return self._hash or "-".join(map(weights_hash, models))

    def check_counts(self, n: int, best_of: int, seed: int) -> list[int]:
        """n, best_of and seed as ints, best_of lowered to n without a scorer; ValueError if out of range."""
        if {type(n), type(best_of), type(seed)} != {int}:
            n, best_of, seed = whole_numbers(n=n, best_of=best_of, seed=seed)
        if not 1 <= n <= best_of <= MAX_COUNT:
            raise ValueError(f"best_of must be n to {MAX_COUNT}, n 1 or more; got best_of={best_of}, n={n}")
        if self.scorer is None and best_of > n:
            warnings.warn(f"this model has no scorer: generating {n} images, unranked", stacklevel=4)
            best_of = n
        return [n, best_of, seed]

    def check_prompts(self, prompts: Sequence[str], warn: bool = False) -> list[list[int]]:
        """Text ids of prompts; ValueError for an empty one; can warn of letters outside the vocabulary."""
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"the prompt must be text, got {prompts!r}")
        ids = [self.text.encode(prompt) for prompt in prompts]
        if not all(ids) or not all(map(VISIBLE.search, prompts)):
            raise ValueError("the prompt is empty; describe the image")
        if warn and (pieces := [p for prompt in prompts for p in self.text.out_of_vocabulary(prompt)]):
            shown = ", ".join(map(repr, pieces[:5]))
            warnings.warn(
                f"the vocabulary lacks letters of {shown}: the model may not know them", stacklevel=4
            )
        return ids

    def stream(
        self, prompt: str, n: int = 1, seed: int = 0, truncate: bool = False, **sampling
    ) -> Iterator[list[Image.Image]]:
        """Yields n unranked images as they are made; the last are those of `generate`; arguments as there.

        A DALL-E yields them after each row of tokens, a GLIDE after each step, as the step takes them to be:
        those of the base model are smaller than the upsampled ones.
        """
        for step in self.steps([prompt], n, n, seed, self.Sampling(**sampling), truncate=truncate):
            if step.batch.wanted < n:
                raise ValueError(f"n must be at most {step.batch.wanted}, got {n}; raise batch_size")
            if step.has_images:
                yield step.images

    def run(self, steps: Iterator[Any], progress: bool, callback: Any) -> list[Generation]:
        """The generations of a sampling loop, after an interruption those that are ranked; see `generate`."""
        step = None
        try:
            with tqdm(desc="sampling", disable=None if progress else True) as bar:
                for step in steps:
                    bar.unit, (done, bar.total) = step.unit, step.done
                    bar.update(done - bar.n)
                    if callback is not None and (step.ranked or step.has_images):
                        callback(step)
        except KeyboardInterrupt:
            if step is None or not step.seen:
                raise
            warnings.warn(f"interrupted: {step.seen} of {step.total} candidates are ranked", stacklevel=3)
        return [top.generation() for top in step.top if top.seen] if step else []

    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory (dalle/hub/registry.py), with a model card.

        Raises:
            ValueError: a model that is not one of the library's own, rounded weights, or no right to write.
        """
        if self._hash is not None:
            raise ValueError("the weights were rounded by to_precision; save the original model")
        parts = self.parts
        if self.scorer is not None:
            parts["clip"] = getattr(self.scorer, "model", None)
        write_model_directory(Path(directory), parts, self.text, report=report, license=license)

    @classmethod
    def open_directory(
        cls, source: Path | str, revision: str | None = None, token: str | bool | None = None
    ) -> tuple[Path, list[str]]:
        """The directory of a source, and those of its parts that this pipeline takes, "clip" among them.

        ValueError for the directory of another pipeline.
        """
        kinds, directory = (*cls.PARTS, "clip"), Path(source)
        if revision is not None or not directory.is_dir():
            directory = resolve_source(source, kinds, revision, token)
        found = read_config(directory)["parts"]
        owners = {PIPELINES[part] for part in found if part in PIPELINES}
        for other in owners - {base.__name__ for base in cls.__mro__}:
            raise ValueError(f"{source} holds a {other}; open it with {other}.from_pretrained")
        return directory, [kind for kind in kinds if kind in found or kind not in cls.OPTIONAL]

    def to(self, device: str | torch.device) -> Self:
        """Moves the models to a device; "auto" is the first there is of cuda, mps and cpu. Returns itself.

        Other pipelines that share them stay where they are.
        """
        device = resolve_device(str(device))
        for name, model in self.parts.items():
            setattr(self, name, copy_to_device(model, device))
        if isinstance(clip := getattr(self.scorer, "model", None), nn.Module):
            self.scorer = copy.copy(self.scorer)
            self.scorer.model = copy_to_device(clip, device)
        return self


def shared_text(
    owner: LoadedModel, text: BPETokenizer | None, *others: LoadedModel | None, needed: tuple[str, ...] = ()
) -> BPETokenizer:
    """The text tokenizer that models loaded from runs were trained with, in the inputs of the `owner`.

    ValueError for another `text` that is given, for models trained with another one, for missing inputs.
    """
    parts = [part for part in others if part]
    for part, names in ((owner, {"text", "text_hash", *needed}), *((part, {"text_hash"}) for part in parts)):
        if missing := sorted(names - part.inputs.keys()):
            raise ValueError(f"{part.source} does not name the {' and '.join(missing)} of its training")
    other, expected = "was trained with a text tokenizer other than", owner.inputs["text_hash"]
    if text and text.hash != expected:
        raise ValueError(f"{owner.source} {other} the one given")
    for part in parts:
        if part.inputs["text_hash"] != expected:
            raise ValueError(f"{part.source} {other} {owner.source}")
    return text_tokenizer_from_dict(owner.inputs["text"])
