"""What each layer attends to, for one caption and image.

The weights are computed by a slow and plain path from the model's own queries and keys: no backend gives them away.

Slot p reads token p - 1 (dalle/layout.py), so a key is shown where the token lies that its slot *read*; slot 0 reads
start-of-text, the first image slot start-of-image. The query of a place is the slot that draws the token there.

    B batch, H heads, n slots, T text slots, R rows and C columns of the grid, d width of a head
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from dalle.layout import TokenLayout
from dalle.nn.blocks import TransformerBlock
from dalle.nn.sparse_mask import SparseMask
from dalle.pipelines.dalle import DALLE
from dalle.transformer import Transformer
from dalle.transformer.generate import inference_autocast
from dalle.viz.figures import figure_image


class LayerWeights(NamedTuple):
    """The attention of one layer."""

    layer: int
    """Its number, from 0."""
    kind: str
    """row, column, conv or causal."""
    weights: Tensor
    """fp32 (B, H, n, n): of each query, over keys; a line adds up to 1."""


@torch.no_grad()
def attention_weights(model: Transformer, ids: Tensor) -> Iterator[LayerWeights]:
    """softmax(q k^T / sqrt(d)) over the visible keys, of one layer after the other.

    Args:
        model: a transformer of this library.
        ids: joint ids int64 (B, n), as `model.layout.pack` gives them.

    Yields:
        one layer's weights at a time: those of all heads of the paper's model take 0.4 GB a layer.
    """
    _check(model)
    model.layout.unpack(ids)
    x = model.embed(model.layout.shift(ids)[:, : ids.shape[1]])  # (B, n, D)
    for number, (layer, kind) in enumerate(zip(model.layers, model.config.kinds, strict=True)):
        with inference_autocast(model):
            weights = _weights(layer, x, model.patterns[kind])
            x = layer(x, model.patterns[kind], "dense")
        yield LayerWeights(number, kind, weights)


def _weights(layer: TransformerBlock, x: Tensor, pattern: SparseMask) -> Tensor:
    block, slots = layer.attention, x.shape[1]
    q, k, _ = rearrange(
        block.f.qkv(block.norm(x)), "b n (three h d) -> three b h n d", three=3, h=block.f.heads
    )
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    sees = pattern.dense(x.device)[:slots, :slots]
    return scores.masked_fill(~sees, -torch.inf).softmax(-1)


class Spread(NamedTuple):
    """How the weight of one query divides; all together adds up to 1."""

    text: np.ndarray
    """(words + 1,): on start-of-text, then on each token of the caption."""
    pads: float
    """On the text slots behind the caption."""
    start: float
    """On start-of-image."""
    image: np.ndarray
    """(R, C): on each image token, at the place where it lies; the last one is read by no slot."""


def spread(weights: Tensor, layout: TokenLayout, words: int) -> Spread:
    """The weights (N,) of one query over all slots of a stream, by what the slots read.

    Args:
        words: tokens of the caption.
    """
    text, image = weights.float().cpu().split([layout.text_len, layout.num_image_tokens])
    grid = torch.cat([image[1:], image.new_zeros(1)]).view(layout.grid)
    return Spread(text[: words + 1].numpy(), float(text[words + 1 :].sum()), float(image[0]), grid.numpy())


def attention_image(
    model: DALLE,
    caption: str,
    image: Image.Image | Path | str | Tensor,
    places: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[int] | None = None,
    truncate: bool = False,
) -> Image.Image:
    """Where layers look while they draw tokens of an image: a line for each layer, a column for each token.

    Each panel is the image, brighter where the layer looks (mean of its heads; the brightest place is white-hot);
    the red square is the token that is drawn. Bars beside it: how much of the weight goes to the text, token by token.

    Args:
        caption: the caption.
        image: the image (its middle square is resized to the model's size), or its image tokens, R * C of them.
        places: (row, column) of the tokens; three in the middle column unless given.
        layers: their numbers, from 0; the last of each kind unless given.
        truncate: cut a caption that is too long instead of refusing it.

    Raises:
        ValueError: a place or layer that is not there; an empty or too long caption; a transformer of another library.
    """
    _check(model.transformer)
    layout, kinds = model.transformer.layout, model.transformer.config.kinds
    places = places or [(layout.rows * part // 4, layout.columns // 2) for part in (1, 2, 3)]
    chosen = sorted({kind: i for i, kind in enumerate(kinds)}.values()) if layers is None else list(layers)
    for row, column in places:
        if not (0 <= row < layout.rows and 0 <= column < layout.columns):
            raise ValueError(
                f"place must lie in the grid of {layout.rows} x {layout.columns}, got ({row}, {column})"
            )
    if not chosen or not all(0 <= layer < len(kinds) for layer in chosen):
        raise ValueError(f"layers must be numbers from 0 to {len(kinds) - 1}, got {chosen}")
    tokens = image.reshape(1, -1).to(model.device) if isinstance(image, Tensor) else model.encode(image)
    if tokens.shape[1] != layout.num_image_tokens:
        raise ValueError(
            f"expected the {layout.num_image_tokens} image tokens of one image, got {tuple(image.shape)}"
        )
    ids = layout.pack(model.text_tokens([caption], truncate), tokens)
    pixels = model.decode(tokens)[0].movedim(0, -1).float().cpu().numpy()
    read = model.text.encode(caption)[: layout.max_caption_len]
    words = ["start", *(model.text.decode([one]).strip() or "?" for one in read)]
    queries = [layout.text_len + row * layout.columns + column for row, column in places]
    figure = Figure(figsize=(2.1 * len(places) + 2.6, 2.35 * len(chosen)), layout="constrained")
    axes = iter(figure.subplots(len(chosen), len(places) + 1, squeeze=False))
    for layer, kind, weights in attention_weights(model.transformer, ids):
        if layer in chosen:
            of_query = [spread(weights[0, :, query].mean(0), layout, len(words) - 1) for query in queries]
            _line(next(axes), f"{kind}, layer {layer + 1}", pixels, of_query, places, words)
    return figure_image(figure)


def _line(
    axes: Any, name: str, pixels: np.ndarray, found: list[Spread], places: Sequence, words: list[str]
) -> None:
    """The panels of a layer."""
    for axis, one, (row, column) in zip(axes, found, places, strict=False):
        cell = pixels.shape[0] // one.image.shape[0]
        axis.imshow(_lit(pixels, one.image, cell))
        corner = (column * cell - 0.5, row * cell - 0.5)
        axis.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="#ff2d55", linewidth=1.6))
        axis.set_title(
            f"text {one.text.sum() + one.pads:.0%}, image {one.start + one.image.sum():.0%}", fontsize=8
        )
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel(name, fontsize=9)
    means = [float(np.mean([one.text[i] for one in found])) for i in range(len(words))]
    means.append(float(np.mean([one.pads for one in found])))
    axes[-1].barh(range(len(means)), means, color="#2d6cb5")
    axes[-1].set_yticks(range(len(means)), [*words, "pads"], fontsize=6)
    axes[-1].invert_yaxis()
    axes[-1].tick_params(axis="x", labelsize=6)
    axes[-1].set_title("on the text, mean of the tokens", fontsize=8)


def _lit(pixels: np.ndarray, weights: np.ndarray, cell: int) -> np.ndarray:
    """The image in dim grey, lit by the weights."""
    heat = np.kron(weights / max(float(weights.max()), 1e-12), np.ones((cell, cell)))[..., None]
    grey = pixels.mean(-1, keepdims=True) * 0.35 + 0.05
    return (grey * (1 - heat) + colormaps["inferno"](heat[..., 0])[..., :3] * heat).clip(0, 1)


def attention_matrix(weights: Tensor) -> Image.Image:
    """Weights (n, n) of one head, or a mean of heads, as an image: a pixel a pair, dark is none, bright is much.

    The square root is drawn, so that small weights show; the largest weight is brightest.
    """
    if weights.ndim != 2:
        raise ValueError(
            f"weights must be (n, n), got {tuple(weights.shape)}; take a head, or the mean of the heads"
        )
    root = weights.float().clamp(min=0).sqrt().cpu().numpy()
    return Image.fromarray(
        (colormaps["inferno"](root / max(float(root.max()), 1e-12))[..., :3] * 255).astype(np.uint8)
    )


def _check(model: Any) -> None:
    if not isinstance(model, Transformer):
        raise ValueError(
            f"attention is shown of this library's own Transformer only, got {type(model).__name__}"
        )
