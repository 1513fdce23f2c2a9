"""Loading checkpoints of other programs: detection of their format, and the models in them."""

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from dalle.io.files import read_json
from dalle.io.torch_file import SavedFile, read_torch_file, weights_of
from dalle.pipelines.dalle import DALLE
from dalle.pretrained import glide_clip, openai_clip, openai_dvae, unet, vqgan
from dalle.pretrained.archive import extract, is_archive
from dalle.pretrained.dalle_pytorch import model as dalle_pytorch
from dalle.pretrained.dalle_pytorch.vae import DISCRETE_VAE
from dalle.pretrained.family import DetectedCheckpoint, count_matches, load_weights
from dalle.pretrained.mindalle import model as mindalle
from dalle.pretrained.rudalle import model as rudalle
from dalle.text import BPETokenizer
from dalle.types import ImageTokenizer, Scorer
from dalle.unet import Classifier, UNet, UNetConfig

FAMILIES = (
    dalle_pytorch.FAMILY,
    mindalle.FAMILY,
    rudalle.FAMILY,
    openai_dvae.FAMILY,
    openai_clip.OPENAI,
    openai_clip.OPEN_CLIP,
    vqgan.WAVELETS,
    vqgan.TAMING,
    vqgan.GUMBEL,
    vqgan.LLAMAGEN,
    DISCRETE_VAE,
    unet.GLIDE,
    unet.ADM,
    unet.CLASSIFIER,
    glide_clip.IMAGE,
    glide_clip.TEXT,
)
"""In the order in which they are tried."""
DALLE_MINI = "dalle-mini (also Craiyon): its decoder attends to an encoder of the caption, which ours cannot"
DEEPSPEED = (
    "its weights are in pieces that only DeepSpeed joins; run the zero_to_fp32.py in it, save the result as "
    "`weights` next to the hparams of auxiliary.pt"
)
UNSUPPORTED = {
    "min-dalle, a copy of dalle-mini: its encoder and decoder are BART's": ("layers.*.glu.fc0.weight",),
    "LlamaGen's transformer: captions enter it as vectors of a T5 encoder, which this library lacks": (
        "cls_embedding.*",
        "layers.*.attention.wqkv.weight",
    ),
    "the class-conditional transformer of taming-transformers: it reads no captions": (
        "transformer.tok_emb.weight",
        "transformer.blocks.*.attn.key.weight",
    ),
    "minDALL-E transferred to ImageNet: it reads no captions": ("*sos*", "*tok_emb_img.weight"),
    "a latent diffusion model: its U-Net reads the vectors of an autoencoder, which this library lacks": (
        "*input_blocks.*.transformer_blocks.*",
    ),
}
"""Reason -> patterns of tensor names, each of which must match."""


def is_external_checkpoint(path: Path) -> bool:
    """Whether a path is a file, OpenAI's folder of two files or minDALL-E's folder."""
    names = (mindalle.STAGE2, *(f"{half}.pkl" for half in openai_dvae.HALVES))
    return os.path.isfile(path) or any(os.path.isfile(path / name) for name in names)


def extracted(path: Path | str) -> AbstractContextManager[Path]:
    """The path itself, or a folder with the files of minDALL-E's archive; ValueError for another archive."""
    return extract(Path(path), mindalle.FILES)


def detect_checkpoint(path: Path | str) -> DetectedCheckpoint:
    """The format of a file or folder (minDALL-E's transformer); ValueError for one that cannot be read."""
    path = Path(path)
    check_supported_path(path)
    if mindalle.is_folder(path):
        path = path / mindalle.STAGE2
    if path.is_dir():
        tensors = openai_dvae.read_folder(path)
        return DetectedCheckpoint(path, openai_dvae.FAMILY, tensors, container="two whole modules")
    return _detect(read_torch_file(path))


def _detect(saved: SavedFile) -> DetectedCheckpoint:
    tensors, tree = weights_of(saved.tree), saved.tree
    if isinstance(tree, dict) and {"hparams", "vae_params"} <= tree.keys() and not tensors:
        raise ValueError(f"{saved.path} is the part next to DeepSpeed's folder: {DEEPSPEED}")
    for reason, patterns in UNSUPPORTED.items():
        if all(count_matches(tensors, pattern) for pattern in patterns):
            raise ValueError(f"{saved.path} is not supported. It is of {reason}")
    family = next((family for family in FAMILIES if family.matches(tensors)), None)
    if family is openai_dvae.FAMILY:
        tensors = openai_dvae.read_tensors(saved)
    return DetectedCheckpoint(saved.path, family, tensors, tree, saved.container)


def check_supported_path(path: Path) -> None:
    """ValueError for files and folders of Flax, which only dalle-mini publishes, and for DeepSpeed's."""
    flax = path.suffix == ".msgpack" or (path / "flax_model.msgpack").is_file()
    if not flax and (path / "config.json").is_file():
        flax = read_json(path / "config.json").get("model_type") == "dallebart"
    if flax:
        raise ValueError(f"{path} is not supported. It is of {DALLE_MINI}")
    if path.is_dir() and any(path.glob("global_step*")):
        raise ValueError(f"{path} is a folder of DeepSpeed: {DEEPSPEED}")


def _inner_tokenizer(found: DetectedCheckpoint) -> DetectedCheckpoint:
    """The image tokenizer inside DALLE-pytorch's transformer; the file itself where there is none."""
    prefix = dalle_pytorch.INSIDE
    tensors = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
    if found.family is None or found.family.kind != "transformer" or not tensors:
        return found
    hparams = found.tree.get("vae_params") if isinstance(found.tree, dict) else None
    return _detect(SavedFile(found.path, found.container, {"hparams": hparams, "state_dict": tensors}))


def load_image_tokenizer(path: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """An `ImageTokenizer` from a published file, or from a folder of OpenAI's encoder.pkl and decoder.pkl.

    Of DALLE-pytorch's dalle.pt and of minDALL-E's folder or archive it is the one inside.
    """
    with extracted(path) as folder:
        file = folder / mindalle.STAGE1 if mindalle.is_folder(folder) else folder
        return _load(_inner_tokenizer(detect_checkpoint(file)), "image tokenizer").to(device)


def load_transformer(path: Path | str, device: str | torch.device = "cpu") -> nn.Module:
    """A transformer of another program without its tokenizers (see `load_external_pipeline`)."""
    with extracted(path) as folder:
        return _load(detect_checkpoint(folder), "transformer").to(device)


def load_unet(path: Path | str, device: str | torch.device = "cpu", config: UNetConfig | None = None) -> UNet:
    """A U-Net from a file of GLIDE or guided-diffusion, its configuration in `.config`.

    `config` is needed for a U-Net that OpenAI did not publish, whose file does not show its attention heads.
    """
    found = detect_checkpoint(path)
    if config is not None and found.family in (unet.GLIDE, unet.ADM):
        found = replace(found, family=replace(found.family, infer_config=lambda *_: config))
    return _load(found, "diffusion").to(device)


def load_classifier(path: Path | str, device: str | torch.device = "cpu") -> Classifier:
    """A classifier of noised images from a file of guided-diffusion."""
    return _load(detect_checkpoint(path), "classifier").to(device)


def load_noised_clip(
    image: Path | str, text: Path | str, device: str | torch.device = "cpu"
) -> tuple[glide_clip.ImageTower, glide_clip.TextTower]:
    """Both towers of GLIDE's noised CLIP, from clip_image_enc.pt and clip_text_enc.pt."""
    towers = [
        _load(detect_checkpoint(path), family.kind).to(device)
        for path, family in ((image, glide_clip.IMAGE), (text, glide_clip.TEXT))
    ]
    if (widths := [tower.config.embed_width for tower in towers])[0] != widths[1]:
        raise ValueError(f"{image} and {text} do not belong together: they are {widths} wide")
    return towers[0], towers[1]


def _load(found: DetectedCheckpoint, kind: str) -> nn.Module:
    family = found.family
    if family is None or family.kind != kind:
        what = f"of kind {family.kind!r} ({family.name})" if family else "of an unknown format"
        names = ", ".join(family.name for family in FAMILIES if family.kind == kind)
        raise ValueError(f"{found.path} is {what}, not a published {kind}; known are: {names}")
    return load_weights(found)


def holds_text_tokenizer(path: Path) -> bool:
    """Whether the text tokenizer is inside, as in minDALL-E's folder or archive."""
    return mindalle.is_folder(path) or is_archive(path)


def load_external_pipeline(
    path: Path | str,
    text: BPETokenizer | None = None,
    dvae: ImageTokenizer | None = None,
    scorer: Scorer | None = None,
    device: str | torch.device = "cpu",
) -> DALLE:
    """A `DALLE` from DALLE-pytorch's dalle.pt, ruDALL-E's pytorch_model.bin, minDALL-E's archive or folder.

    The tokenizers are by default those in the file; ValueError for missing parts, or some of other models.
    """
    with extracted(path) as folder:
        if text is None and not mindalle.is_folder(folder):
            raise ValueError(f"{path} does not hold its text tokenizer; give the one of its training")
        text = mindalle.load_tokenizer(folder) if text is None else text
        transformer = load_transformer(folder, device)
        if isinstance(transformer, rudalle.Rudalle):
            text = rudalle.lowercase(text)
            if dvae is None:
                raise ValueError(f"{path} is ruDALL-E's transformer; give its image tokenizer too, a VQGAN")
        dvae = load_image_tokenizer(folder, device) if dvae is None else dvae
        return DALLE(dvae, transformer, text, scorer)
