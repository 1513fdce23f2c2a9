"""Checkpoints that are known and cannot be held, each with its reason."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dalle.io.files import read_json

DALLE_MINI = (
    "dalle-mini (also Craiyon): an encoder that reads the whole caption and a decoder that attends to it, as in BART; "
    "the transformer here is one stream with one kind of attention, and cannot compute that"
)

GATHER = (
    "the weights lie in pieces that DeepSpeed alone joins; run the zero_to_fp32.py that it left there, and save the "
    "result as `weights` beside the hparams of auxiliary.pt"
)

BY_NAMES = {
    "min-dalle, a copy of dalle-mini: its encoder and decoder are those of BART, the transformer here is one stream": (
        "layers.*.glu.fc0.weight",
    ),
    "LlamaGen's transformer: captions enter it as vectors of a T5 encoder, which is no part of this library": (
        "cls_embedding.*",
        "layers.*.attention.wqkv.weight",
    ),
    "the class-conditional transformer of taming-transformers: it reads no captions": (
        "transformer.tok_emb.weight",
        "transformer.blocks.*.attn.key.weight",
    ),
    "minDALL-E as it was transferred to ImageNet: it draws a class or anything at all, and reads no captions": (
        "sos*",
        "tok_emb_img.weight",
    ),
    "minDALL-E as it was transferred to ImageNet, with its image tokenizer: it reads no captions": (
        "stage2.sos*",
        "stage2.tok_emb_img.weight",
    ),
    "GLIDE or another diffusion model: it draws no tokens": ("input_blocks.*", "middle_block.*"),
}
"""Reason -> patterns of names, each of which must be met."""


def refuse_path(path: Path) -> None:
    """ValueError for a file or folder of Flax, for only dalle-mini publishes those, and for a folder of DeepSpeed."""
    flax = path.suffix == ".msgpack" or (path / "flax_model.msgpack").is_file()
    config = path / "config.json"
    if not flax and config.is_file():
        settings = read_json(config)
        flax = isinstance(settings, dict) and settings.get("model_type") == "dallebart"
    if flax:
        raise ValueError(f"{path} cannot be held here. It is of {DALLE_MINI}")
    if path.is_dir() and any(path.glob("global_step*")):
        raise ValueError(f"{path} is a folder of DeepSpeed: {GATHER}")


def refuse_tensors(path: Path, names: Iterable[str], tree: Any = None) -> None:
    """ValueError for names of tensors by which a format is known that can have no reader, and for a file, `tree`, of
    DALLE-pytorch whose weights are elsewhere."""
    names = list(names)
    if isinstance(tree, dict) and {"hparams", "vae_params"} <= tree.keys() and not names:
        raise ValueError(
            f"{path} is the part of DALLE-pytorch's checkpoint beside DeepSpeed's folder: {GATHER}"
        )
    for reason, patterns in BY_NAMES.items():
        if all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns):
            raise ValueError(f"{path} cannot be held here. It is of {reason}")
