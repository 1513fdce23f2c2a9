"""The one door to checkpoints of other programs: whose file is it, and the model in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dalle.pretrained import openai_clip, openai_dvae, vqgan
from dalle.pretrained.family import Family, fill
from dalle.pretrained.pickle_names import SavedTensor
from dalle.pretrained.refused import refuse_path, refuse_tensors
from dalle.pretrained.saved_file import open_saved, weights_of

FAMILIES = (
    openai_dvae.FAMILY, openai_clip.OPENAI, openai_clip.OPEN_CLIP, vqgan.TAMING, vqgan.GUMBEL, vqgan.LLAMAGEN,
)  # fmt: skip
"""In the order in which they are tried."""


@dataclass(frozen=True)
class Found:
    """A file or folder of another program; its numbers are not yet read."""

    path: Path
    container: str
    family: Family | None
    """None where nobody is known who writes such names."""
    tensors: Mapping[str, SavedTensor]


def is_published(path: Path) -> bool:
    """Whether a path is a file, or the folder of OpenAI's two: none of this library's own runs or model directories."""
    return path.is_file() or any((path / f"{part}.pkl").is_file() for part in openai_dvae.PARTS)


def find(path: Path | str) -> Found:
    """Whose checkpoint it is.

    Raises:
        ValueError: a file that cannot be read, that would run code, or that is known and cannot be held.
    """
    path = Path(path)
    refuse_path(path)
    if path.is_dir():
        return Found(path, "two whole modules", openai_dvae.FAMILY, openai_dvae.gather(path))
    saved = open_saved(path)
    tensors = weights_of(saved.tree)
    refuse_tensors(path, tensors)
    family = next((family for family in FAMILIES if family.recognises(tensors)), None)
    if family is openai_dvae.FAMILY:
        tensors = openai_dvae.gather(path)
    elif family and family.settle:
        family = family.settle(family, saved.tree, tensors)
    return Found(path, saved.container, family, tensors)


def load_image_tokenizer(path: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """An `ImageTokenizer` from a published file, or from a folder of OpenAI's encoder.pkl and decoder.pkl.

    Raises:
        ValueError: no image tokenizer that is known, or one whose tensors are not all there.
    """
    return _load(path, "image tokenizer").to(device)


def _load(path: Path | str, kind: str) -> nn.Module:
    found = find(path)
    if found.family is None or found.family.kind != kind:
        what = f"a {found.family.kind} ({found.family.name})" if found.family else "of nobody that is known"
        names = ", ".join(family.name for family in FAMILIES if family.kind == kind)
        raise ValueError(f"{path} is {what}, not a published {kind}; known are: {names}")
    return fill(found.family, found.tensors, path)
