"""ruDALL-E (Sber): a state dict of the transformer alone. Malevich, Emojich, Surrealist XL, Kandinsky.

128 text ids between begin and end marks, each empty position with its own pad, and 32 x 32 image tokens. Row
and column masks are ours; the last layer sees a square around each token. The file's three masks distinguish
its two versions, whose tensors have the same names and shapes:

    v2    another begin mark in front shifts the inputs by one but not the masks, to which the last text id is
          the first image token. The square wraps around all borders of the image
    v3    no mark in front: no state predicts the first text id. The square ends at the border

The number of heads is known for the published widths. The text tokenizer is a youtokentome model, bpe.model,
of lowercase captions; the image tokenizer is vqgan.gumbelf8-sber.model.ckpt, or its sibling with wavelets
(dalle/pretrained/vqgan.py). The package's measure against overflow in fp16 (CogView's "PB-relax")
changes nothing in fp32 and is omitted.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from dalle.config import configuration
from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_transformer import (
    ExternalConfig,
    ExternalLayout,
    ExternalTransformer,
    stream_mask,
)
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches
from dalle.text import BPETokenizer
from dalle.text.external.youtokentome import YoutokentomeTokenizer

VERSIONS = ("v2", "v3")
BEGIN, END = 2, 3  # ids of text
REACH = 5  # of the square, to each side


@configuration(kw_only=True)
class RudalleConfig(ExternalConfig):
    """Shape of the transformer, by default of the published XL. `text_len` counts begin and end."""

    width: int = 2048
    heads: int = 16
    text_len: int = 128
    grid: tuple[int, int] = (32, 32)
    text_vocab: int = 16384
    image_vocab: int = 8192
    gelu: str = "tanh"
    sandwich: bool = True
    max_attention: float | None = 65504.0  # the largest number of fp16
    depth: int = 24  # layers
    version: str = "v3"  # one of VERSIONS

    @property
    def layout(self) -> ExternalLayout:
        sizes = self.text_len, self.grid, self.text_vocab, self.image_vocab
        start = BEGIN if self.version == "v2" else None
        return ExternalLayout(*sizes, start=start, zero_is_pad=True, frame=(BEGIN, END))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of mask of each layer: row, column, row, row, ...; the last a square unless it is a column."""
        last = self.depth - 1
        return tuple("column" if i % 4 == 1 else "square" if i == last else "row" for i in range(self.depth))

    @property
    def prefix_len(self) -> int:
        """See `ExternalConfig`: to the masks of v2, the last text id is the first image token."""
        return self.text_len

    def image_mask(self, kind: str) -> Tensor:
        if kind != "square":
            return super().image_mask(kind)
        side = self.grid[0]
        index = torch.arange(side * side)
        mask = index[:, None] >= index
        for axis in (index // side, index % side):
            distance = (axis[:, None] - axis).abs()
            if self.version == "v2":
                distance = torch.minimum(distance, side - distance)
            mask &= distance <= REACH
        return mask


class Rudalle(ExternalTransformer):
    """Two norms precede the output matrix: the last layer's and its own."""

    def __init__(self, config: RudalleConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        self.text_position = nn.Embedding(layout.text_len + 1, width)
        self.row_position = nn.Embedding(layout.rows, width)
        self.column_position = nn.Embedding(layout.columns, width)
        self.final = nn.Sequential(FP32LayerNorm(width), FP32LayerNorm(width))
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        row, column = positions // self.layout.columns, positions % self.layout.columns
        return self.image_embedding(tokens) + (self.row_position(row) + self.column_position(column))


HEADS = {(24, 2048): 16, (64, 3840): 60, (12, 768): 12}
"""(depth, width) -> heads, of Malevich and its siblings, Kandinsky, and the package's untrained "dummy"."""
MASKS = {"row": "row_mask", "column": "col_mask", "square": "conv_mask"}
SPECIAL = {"unknown": 1, "pad": 0, "begin": BEGIN, "end": END}

RENAMES = {
    r"^transformer\.layers\.": "layers.",
    r"\.input_layernorm\.": ".attention.norm.",
    r"\.before_first_addition_layernorm\.": ".attention.norm_out.",
    r"\.post_attention_layernorm\.": ".mlp.norm.",
    r"\.before_second_addition_layernorm\.": ".mlp.norm_out.",
    r"\.attention\.query_key_value\.": ".attention.f.qkv.0.",
    r"\.attention\.dense\.": ".attention.f.out.",
    r"\.mlp\.dense_h_to_4h\.": ".mlp.f.expand.",
    r"\.mlp\.dense_4h_to_h\.": ".mlp.f.project.",
    r"^(text|image)_embeddings\.": r"\1_embedding.",
    r"^text_pos_embeddings\.": "text_position.",
    r"^image_row_embeddings\.": "row_position.",
    r"^image_col_embeddings\.": "column_position.",
    r"^transformer\.final_layernorm\.": "final.0.",
    r"^to_logits\.0\.": "final.1.",
    r"^to_logits\.1\.": "to_logits.",
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
    masks = {}
    for kind, name in MASKS.items():
        mask = found.tensors.get(f"transformer.{name}", found.tensors.get(name))
        if mask is None:
            raise ValueError(f"it lacks {name}; only its masks distinguish v2 from v3")
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
    renames=lambda names: RENAMES,
    ignored=tuple(f"{prefix}{name}" for prefix in ("", "transformer.") for name in MASKS.values()),
)
