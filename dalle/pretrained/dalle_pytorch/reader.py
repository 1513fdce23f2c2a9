"""dalle.pt of DALLE-pytorch (lucidrains), version 1.6: the transformer and the image tokenizer inside.

Heads and kinds of layers are in the file's `hparams`. Wrappers around a module depend on the options of
training and nest the names, so names are matched by their ends. Versions before 1.6 differ under the same
names (shifts, masks, positions) and are refused. The text tokenizer is not in the file: CLIP's unless another
was chosen.
"""

import re
from collections.abc import Collection, Mapping
from itertools import cycle, islice
from math import isqrt
from reprlib import repr as shown
from typing import Any

from dalle.pretrained.dalle_pytorch.model import DallePytorch, DallePytorchConfig
from dalle.pretrained.dalle_pytorch.vae import LICENSE
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes

VERSION = "1.6."
INSIDE = "vae."
_LAYER = re.compile(
    r"transformer\.layers\.(?:layers\.(\d+)\.([01])|blocks\.(\d+)\.([fg])\.net)\.(?:fn\.)*"
    r"(scale|norm\.\w+|norm_out\.\w+|to_qkv\.weight|to_out\.0\.\w+|net\.[03]\.\w+)"
)
_PARTS = {"to_qkv": "f.qkv.0", "to_out.0": "f.out", "net.0": "f.expand", "net.3": "f.project"}
_OTHERS = {
    "text_emb.": "text_embedding.",
    "image_emb.": "image_embedding.",
    "text_pos_emb.": "text_position.",
    "transformer.pos_emb": "angles",
    "image_pos_emb.weights.": "image_position.",
    "image_pos_emb.weights_": "image_position.",
    "to_logits.0.": "final_norm.",
    "to_logits.1.": "to_logits.",
}
"""Beginnings of names outside of layers."""


def own_name(name: str, names: Collection[str] = ()) -> str:
    """The file's name of a tensor -> the model's."""
    match = _LAYER.fullmatch(name)
    if not match:
        for theirs, ours in _OTHERS.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name
    layer, path, rest = match[1] or match[3], match[2] or match[4], match[5]
    for theirs, ours in _PARTS.items():
        if rest.startswith(f"{theirs}."):
            rest = ours + rest.removeprefix(theirs)
    return f"layers.{layer}.{'attention' if path in '0f' else 'mlp'}.{rest}"


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> DallePytorchConfig:
    """Sizes from the file's hyper-parameters and the shapes; ValueError for what is not supported."""
    hparams = _hparams(found.tree)
    text_len, depth, width = (_number(hparams, name) for name in ("text_seq_len", "depth", "dim"))
    text_vocab = _number(hparams, "num_text_tokens", 10000)
    layers = sum(name.endswith(".attention.scale") for name in shapes)
    if (depth, width) != (layers, shapes["final_norm.weight"][0]):
        raise ValueError(
            f"hparams has {depth} layers of width {width}, the tensors {layers} or another width"
        )
    rotary = shapes.get("angles")
    side = isqrt(max(0, rotary[1] - text_len - 1)) if rotary else shapes["image_position.0"][1]
    kinds = hparams.get("attn_types") or ("full",)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return DallePytorchConfig(
        width=width,
        heads=_number(hparams, "heads", 8),
        head_dim=_number(hparams, "dim_head", 64),
        kinds=tuple(islice(cycle(map(str, kinds)), depth)),
        text_len=text_len,
        grid=(side, side),
        text_vocab=text_vocab,
        image_vocab=shapes["to_logits.weight"][0] - text_vocab - text_len,
        shift=bool(hparams.get("shift_tokens", True)),
        rotary=rotary[2] if rotary else 0,
        sandwich=bool(hparams.get("sandwich_norm", False)),
        reversible=bool(hparams.get("reversible", False)),
        stable=bool(hparams.get("stable", False)),
        shared=bool(hparams.get("share_input_output_emb", False)),
    )


def _hparams(tree: Any) -> Mapping[str, Any]:
    hparams = tree.get("hparams") if isinstance(tree, dict) else None
    if not isinstance(hparams, dict):
        raise ValueError("it has no hparams, which name heads and kinds of layers")
    version = tree.get("version")
    if not str(version).startswith(VERSION):
        which = f"version {version!s:.20}" if version else "a version before 1.0 (it names none)"
        raise ValueError(f"it is of {which}; only {VERSION}x is supported")
    return hparams


def _number(hparams: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = hparams.get(name, default)
    if type(value) is not int or not 0 < value < 2**31:
        raise ValueError(f"hparams has {name} {shown(value):.40}, expected a positive number")
    return value


FAMILY = CheckpointFormat(
    name="DALLE-pytorch",
    kind="transformer",
    license=LICENSE,
    key_patterns=(
        "to_logits.1.weight",
        "*_emb.*weight",
        "transformer.layers.*to_qkv.weight",
        "transformer.layers.*net.3.weight",
    ),
    infer_config=infer_config,
    build=DallePytorch,
    rename=own_name,
    ignored=(f"{INSIDE}*", "text_emb.linear.*", "image_emb.linear.*", "logits_mask"),
)
