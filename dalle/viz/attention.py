"""Attention maps: what each layer attends to for one caption and image.

The weights are computed here from queries and keys, since the fast backends do not return them. Position p
reads token p - 1 (dalle/layout.py): a key is shown at the token that its position reads, a query at the token
that it predicts. Position 0 reads start-of-text, the first image position start-of-image.

    B batch, H heads, n positions, T text positions, R rows and C columns of the grid, d width of a head
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
from dalle.pipelines.dalle import DALLE
from dalle.transformer import Transformer
from dalle.transformer.generate import inference_autocast
from dalle.viz.curves import figure_image
from dalle.viz.masks import query_at


class LayerWeights(NamedTuple):
    """The attention of one layer."""

    layer: int  # index of the layer, from 0
    kind: str  # row, column, conv or causal
    weights: Tensor  # fp32 (B, H, n, n): softmax over keys for each query


@torch.no_grad()
def attention_weights(model: Transformer, ids: Tensor) -> Iterator[LayerWeights]:
    """softmax(q k^T / sqrt(d)) over the visible keys of joint ids int64 (B, n), layer by layer.

    A layer of the paper's model takes 0.4 GB.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"attention plots need this library's Transformer, got {type(model).__name__}")
    x = model.embed(model.layout.shift(ids)[:, : ids.shape[1]])  # (B, n, D)
    for number, (layer, kind) in enumerate(zip(model.layers, model.config.kinds, strict=True)):
        block, pattern, length = layer.attention, model.patterns[kind], x.shape[1]
        mask = pattern.dense(x.device)[:length, :length]
        with inference_autocast(model):
            qkv = block.f.qkv(block.norm(x))
            q, k, _ = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=block.f.heads)
            if block.f.qk_norm:
                q, k = block.f.normalize(q, k)
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            x = layer(x, pattern, "dense")
        yield LayerWeights(number, kind, weights)


class AttentionShares(NamedTuple):
    """The attention of one query by its target; the sum over all fields is 1."""

    text: np.ndarray  # (words + 1,): to start-of-text, then to each token of the caption
    pads: float  # to the padding after the caption
    start: float  # to start-of-image
    image: np.ndarray  # (R, C): to each image token; no position reads the last one


def attention_shares(weights: Tensor, layout: TokenLayout, words: int) -> AttentionShares:
    """Splits the weights (N,) of one query over a whole sequence, for a caption of `words` tokens."""
    text, image = weights.float().cpu().split([layout.text_len, layout.num_image_tokens])
    grid = torch.cat([image[1:], image.new_zeros(1)]).view(layout.grid)
    pads = float(text[words + 1 :].sum())
    return AttentionShares(text[: words + 1].numpy(), pads, float(image[0]), grid.numpy())


def plot_attention(
    model: DALLE,
    caption: str,
    image: Image.Image | Path | str | Tensor,
    positions: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[int] | None = None,
    truncate: bool = False,
) -> Image.Image:
    """What layers attend to when they predict tokens of an image: a row per layer, a column per token.

    Each panel is the image, brighter where the weight is (mean over heads, relative to the maximum); the red
    square is the predicted token. Bars on the right give the weights of the text tokens.

    Args:
        image: the image, of which the center square is taken, or its R * C image tokens.
        positions: (row, column) of the tokens; by default three in the middle column.
        layers: indices of layers; by default the last one of each kind.
    """
    layout, kinds = model.transformer.layout, model.transformer.config.kinds
    positions = positions or [(layout.rows * part // 4, layout.columns // 2) for part in (1, 2, 3)]
    chosen = sorted({kind: i for i, kind in enumerate(kinds)}.values()) if layers is None else list(layers)
    queries = [query_at(layout, *position) for position in positions]
    if not chosen or not all(0 <= layer < len(kinds) for layer in chosen):
        raise ValueError(f"layers must be from 0 to {len(kinds) - 1}, got {chosen}")
    tokens = image.reshape(1, -1).to(model.device) if isinstance(image, Tensor) else model.encode(image)
    ids = layout.pack(model.text_tokens([caption], truncate), tokens)
    pixels = model.decode(tokens)[0].movedim(0, -1).float().cpu().numpy()
    caption_ids = model.text.encode(caption)[: layout.max_caption_len]
    words = ["start", *(model.text.decode([one]).strip() or "?" for one in caption_ids)]
    figure = Figure(figsize=(2.1 * len(positions) + 2.6, 2.35 * len(chosen)), layout="constrained")
    axes = iter(figure.subplots(len(chosen), len(positions) + 1, squeeze=False))
    for layer, kind, weights in attention_weights(model.transformer, ids):
        if layer in chosen:
            row_axes, means = next(axes), weights[0].mean(0)
            shares = [attention_shares(means[query], layout, len(words) - 1) for query in queries]
            row_axes[0].set_ylabel(f"{kind}, layer {layer + 1}", fontsize=9)
            for axis, share, position in zip(row_axes, shares, positions, strict=False):
                _plot_image_attention(axis, pixels, share, position)
            _plot_text_attention(row_axes[-1], shares, words)
    return figure_image(figure)


def _plot_image_attention(
    axis: Any, pixels: np.ndarray, share: AttentionShares, position: tuple[int, int]
) -> None:
    """The image in dim grey, lit by the weights, and the query as a red square."""
    cell = pixels.shape[0] // share.image.shape[0]
    heat = np.kron(share.image / max(float(share.image.max()), 1e-12), np.ones((cell, cell)))[..., None]
    grey = pixels.mean(-1, keepdims=True) * 0.35 + 0.05
    axis.imshow((grey * (1 - heat) + colormaps["inferno"](heat[..., 0])[..., :3] * heat).clip(0, 1))
    corner = (position[1] * cell - 0.5, position[0] * cell - 0.5)
    axis.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor="#ff2d55", linewidth=1.6))
    text, image = share.text.sum() + share.pads, share.start + share.image.sum()
    axis.set_title(f"text {text:.0%}, image {image:.0%}", fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _plot_text_attention(axis: Any, shares: list[AttentionShares], words: list[str]) -> None:
    means = np.mean([[*share.text, share.pads] for share in shares], axis=0)
    axis.barh(range(len(means)), means, color="#2d6cb5")
    axis.set_yticks(range(len(means)), [*words, "pads"], fontsize=6)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=6)
    axis.set_title("text, mean of the tokens", fontsize=8)


def attention_heatmap(weights: Tensor) -> Image.Image:
    """Square roots of weights (n, n), a pixel per query and key, brightest at the maximum."""
    if weights.ndim != 2:
        raise ValueError(f"weights must be (n, n), got {tuple(weights.shape)}; take a head or the mean")
    root = weights.float().clamp(min=0).sqrt().cpu().numpy()
    colors = colormaps["inferno"](root / max(float(root.max()), 1e-12))[..., :3]
    return Image.fromarray((colors * 255).astype(np.uint8))
