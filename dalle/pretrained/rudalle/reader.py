"""ruDALL-E (Sber): a state dict of the transformer alone. Malevich, Emojich, Surrealist XL, Kandinsky.

The file's three masks distinguish version 2 from 3 (dalle/pretrained/rudalle/model.py), whose tensors have
the same names and shapes. The number of heads is known for the published widths. The text tokenizer is a
youtokentome model, bpe.model, of lowercase captions; the image tokenizer is vqgan.gumbelf8-sber.model.ckpt,
or its sibling with wavelets (dalle/pretrained/rudalle/vqgan_dwt.py).
"""

from dataclasses import replace

import torch

from dalle.pretrained.external_transformer import stream_mask
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches, rename_layers
from dalle.pretrained.rudalle.model import BEGIN, END, VERSIONS, Rudalle, RudalleConfig
from dalle.text import BPETokenizer
from dalle.text.external.youtokentome import YoutokentomeTokenizer

HEADS = {(24, 2048): 16, (64, 3840): 60, (12, 768): 12}
"""(depth, width) -> heads, of Malevich and its siblings, Kandinsky, and the package's untrained "dummy"."""
MASKS = {"row": "row_mask", "column": "col_mask", "square": "conv_mask"}
SPECIAL = {"unknown": 1, "pad": 0, "begin": BEGIN, "end": END}

_OTHERS = {
    "text_embeddings": "text_embedding",
    "image_embeddings": "image_embedding",
    "text_pos_embeddings": "text_position",
    "image_row_embeddings": "row_position",
    "image_col_embeddings": "column_position",
    "to_logits.0": "final.1",
    "to_logits.1": "to_logits",
    "transformer.final_layernorm": "final.0",
}
_PARTS = {
    "input_layernorm": "attention.norm",
    "before_first_addition_layernorm": "attention.norm_out",
    "post_attention_layernorm": "mlp.norm",
    "before_second_addition_layernorm": "mlp.norm_out",
    "attention.query_key_value": "attention.f.qkv.0",
    "attention.dense": "attention.f.out",
    "mlp.dense_h_to_4h": "mlp.f.expand",
    "mlp.dense_4h_to_h": "mlp.f.project",
}


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> RudalleConfig:
    """Sizes from the shapes, the version from the masks; ValueError for unknown heads or masks."""
    text_len, side = shapes["text_position.weight"][0] - 1, shapes["row_position.weight"][0]
    depth = count_matches(shapes, "layers.*.attention.norm.weight")
    text_ids, width = shapes["text_embedding.weight"]
    if (depth, width) not in HEADS:
        known = ", ".join(f"{d} layers of width {w}" for d, w in HEADS)
        raise ValueError(f"its heads are unknown: {depth} layers of width {width}, known are {known}")
    config = RudalleConfig(
        width=width,
        depth=depth,
        heads=HEADS[depth, width],
        text_len=text_len,
        grid=(side, side),
        text_vocab=text_ids - text_len,
        image_vocab=shapes["image_embedding.weight"][0],
        sandwich="layers.0.attention.norm_out.weight" in shapes,
    )
    size, masks = text_len + side**2, {}
    for kind, name in MASKS.items():
        mask = found.tensors.get(f"transformer.{name}", found.tensors.get(name))
        if mask is None:
            raise ValueError(f"it lacks {name}; only its masks distinguish v2 from v3")
        if mask.shape != (size, size):
            raise ValueError(f"its {name} is of shape {tuple(mask.shape)}, expected {size} x {size}")
        masks[kind] = mask != 0
    for version in VERSIONS:
        config = replace(config, version=version)
        if all(torch.equal(masks[k], stream_mask(config.image_mask(k), text_len)) for k in MASKS):
            return config
    raise ValueError(f"its masks are neither those of {' nor of '.join(VERSIONS)}")


def lowercase(text: BPETokenizer) -> YoutokentomeTokenizer:
    """The tokenizer of its bpe.model as the package uses it; ValueError for another tokenizer."""
    if not isinstance(text, YoutokentomeTokenizer):
        raise ValueError(f"ruDALL-E reads a youtokentome model, its bpe.model, not a {type(text).__name__}")
    if text.model["special"] != SPECIAL:
        raise ValueError(f"ruDALL-E's bpe.model has the ids {SPECIAL}, this one {text.model['special']}")
    return YoutokentomeTokenizer(text.model | {"lowercase": True})


FAMILY = CheckpointFormat(
    name="ruDALL-E",
    kind="transformer",
    license="Apache-2.0, of github.com/ai-forever/ru-dalle; fine-tuned weights may have another",
    key_patterns=(
        "text_embeddings.weight",
        "image_row_embeddings.weight",
        "transformer.layers.*.attention.query_key_value.weight",
    ),
    infer_config=infer_config,
    build=Rudalle,
    rename=rename_layers(r"transformer\.layers\.(\d+)\.(.+)", _PARTS, _OTHERS),
    ignored=tuple(f"{prefix}{name}" for prefix in ("", "transformer.") for name in MASKS.values()),
)
