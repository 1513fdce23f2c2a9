"""The one door to checkpoints of other programs: whose file is it, and the model in it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.pretrained import openai_clip, openai_dvae, vqgan
from dalle.pretrained.archive import is_archive, unpacked
from dalle.pretrained.dalle_pytorch import reader as dalle_pytorch
from dalle.pretrained.dalle_pytorch import vae as dalle_pytorch_vae
from dalle.pretrained.family import CheckpointFormat, load_weights
from dalle.pretrained.mindalle import reader as mindalle
from dalle.pretrained.refused import refuse_path, refuse_tensors
from dalle.pretrained.rudalle import reader as rudalle
from dalle.pretrained.rudalle import vqgan_dwt as vqgan_wavelets
from dalle.pretrained.torch_file import read_torch_file, weights_of

FAMILIES = (
    dalle_pytorch.FAMILY,
    mindalle.FAMILY,
    rudalle.FAMILY,
    openai_dvae.FAMILY,
    openai_clip.OPENAI,
    openai_clip.OPEN_CLIP,
    vqgan_wavelets.FAMILY,
    vqgan.TAMING,
    vqgan.GUMBEL,
    vqgan.LLAMAGEN,
    dalle_pytorch_vae.FAMILY,
)
"""In the order in which they are tried."""


@dataclass(frozen=True)
class DetectedCheckpoint:
    """A file or folder of another program; its numbers are not yet read."""

    path: Path
    container: str
    family: CheckpointFormat | None
    """None where nobody is known who writes such names."""
    tensors: Mapping[str, Tensor]
    tree: Any = None
    """All that lies in the file."""


def is_external_checkpoint(path: Path) -> bool:
    """Whether a path is a file, OpenAI's folder of two or minDALL-E's: none of this library's runs or directories."""
    return (
        path.is_file()
        or mindalle.is_folder(path)
        or any((path / f"{p}.pkl").is_file() for p in openai_dvae.PARTS)
    )


@contextmanager
def at_hand(path: Path | str) -> Iterator[Path]:
    """The path itself, or a folder to which minDALL-E's archive is unpacked, removed afterwards.

    Raises:
        ValueError: an archive of something else, or one that is damaged or hostile.
    """
    if is_archive(Path(path)):
        with unpacked(Path(path), mindalle.FILES) as folder:
            yield folder
    else:
        yield Path(path)


def detect_checkpoint(path: Path | str) -> DetectedCheckpoint:
    """Whose checkpoint it is; of minDALL-E's folder the transformer.

    Raises:
        ValueError: a file that cannot be read, that would run code, or that is known and cannot be held.
    """
    path = Path(path)
    refuse_path(path)
    if mindalle.is_folder(path):
        path = path / mindalle.STAGE2
    if path.is_dir():
        return DetectedCheckpoint(path, "two whole modules", openai_dvae.FAMILY, openai_dvae.gather(path))
    saved = read_torch_file(path)
    tensors = weights_of(saved.tree)
    refuse_tensors(path, tensors, saved.tree)
    found = _found(path, saved.container, saved.tree, tensors)
    return replace(found, tensors=openai_dvae.gather(path)) if found.family is openai_dvae.FAMILY else found


def _found(path: Path, container: str, tree: Any, tensors: Mapping[str, Tensor]) -> DetectedCheckpoint:
    family = next((family for family in FAMILIES if family.recognizes(tensors)), None)
    if family and family.settle:
        family = family.settle(family, path, tree, tensors)
    return DetectedCheckpoint(path, container, family, tensors, tree)


def _inside(found: DetectedCheckpoint) -> DetectedCheckpoint:
    """The image tokenizer that lies in a transformer's file; itself where there is none."""
    prefix = dalle_pytorch.INSIDE
    tensors = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
    if found.family is None or found.family.kind != "transformer" or not tensors:
        return found
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    told = found.tree.get("vae_params") if isinstance(found.tree, dict) else None
    inner = _found(found.path, found.container, {"hparams": told}, tensors)
    return (
        replace(inner, tensors=openai_dvae.whole_names(tensors))
        if inner.family is openai_dvae.FAMILY
        else inner
    )


def load_image_tokenizer(path: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """An `ImageTokenizer` from a published file, or from a folder of OpenAI's encoder.pkl and decoder.pkl.

    Of DALLE-pytorch's dalle.pt and of minDALL-E's folder or archive it is the one that lies in it.

    Raises:
        ValueError: no image tokenizer that is known, or one whose tensors are not all there.
    """
    with at_hand(path) as place:
        inner = place / mindalle.STAGE1 if mindalle.is_folder(place) else place
        return _load(_inside(detect_checkpoint(inner)), "image tokenizer").to(device)


def load_transformer(path: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """A transformer of others that can be drawn with; `dalle.pretrained.whole.load_external_pipeline` joins it with the rest.

    Raises:
        ValueError: no transformer that is known, or one whose tensors are not all there.
    """
    with at_hand(path) as place:
        return _load(detect_checkpoint(place), "transformer").to(device)


def _load(found: DetectedCheckpoint, kind: str) -> nn.Module:
    if found.family is None or found.family.kind != kind:
        what = (
            f"of kind {found.family.kind!r} ({found.family.name})"
            if found.family
            else "of nobody that is known"
        )
        names = ", ".join(family.name for family in FAMILIES if family.kind == kind)
        raise ValueError(f"{found.path} is {what}, not a published {kind}; known are: {names}")
    return load_weights(found.family, found.tensors, found.path)
