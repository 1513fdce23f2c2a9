"""A VQGAN written out over the tensors of a file, by names of taming-transformers or of LlamaGen; and such
files.

Nothing of it is shared with dalle/vqgan: it follows the descriptions of the published networks, level by
level.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
WIDTHS, LATENT, CODES, CODE_WIDTH = (32, 64, 64), 8, 20, 6
LEVELS = len(WIDTHS)


def names_of_taming(half: str) -> Callable[[str, int], str]:
    """(part, level, finest first) -> prefix."""
    return lambda part, level: {
        "block": f"{half}.{'down' if half == 'encoder' else 'up'}.{level}.block",
        "mid": f"{half}.mid",
        "attn": f"{half}.{'down' if half == 'encoder' else 'up'}.{level}.attn",
        "resize": f"{half}.{'down' if half == 'encoder' else 'up'}.{level}",
    }[part]


def names_of_llamagen(half: str) -> Callable[[str, int], str]:
    """As `names_of_taming`; the decoder counts from the coarsest."""

    def name(part: str, level: int) -> str:
        at = f"{half}.conv_blocks.{level if half == 'encoder' else LEVELS - 1 - level}"
        return {"block": f"{at}.res", "attn": f"{at}.attn", "resize": at, "mid": f"{half}.mid"}[part]

    return name


MIDDLE = {names_of_taming: ("block_1", "attn_1", "block_2"), names_of_llamagen: ("0", "1", "2")}


def make_state(names, blocks: int = 1, attention: tuple[int, ...] = (2,), gumbel: bool = False) -> State:
    """A file's tensors at small width, all random, norms too."""
    state: State = {}
    generator = torch.Generator().manual_seed(0)

    def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(n_out, n_in, kernel, kernel, generator=generator) / (
            n_in**0.5 * kernel
        )
        state[f"{name}.bias"] = torch.randn(n_out, generator=generator) / 10

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 10
        state[f"{name}.bias"] = torch.randn(width, generator=generator) / 10

    def block(name: str, n_in: int, n_out: int) -> None:
        norm(f"{name}.norm1", n_in), conv(f"{name}.conv1", n_in, n_out, 3)
        norm(f"{name}.norm2", n_out), conv(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attn(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for half in ("encoder", "decoder"):
        at, down = names(half), half == "encoder"
        last = WIDTHS[0] if down else WIDTHS[-1]
        conv(f"{half}.conv_in", 3 if down else LATENT, last, 3)
        for level in range(LEVELS) if down else reversed(range(LEVELS)):
            for i in range(blocks + (not down)):
                block(f"{at('block', level)}.{i}", last, WIDTHS[level])
                last = WIDTHS[level]
                if level in attention:
                    attn(f"{at('attn', level)}.{i}", last)
            if level < LEVELS - 1 if down else level > 0:
                conv(f"{at('resize', level)}.{'downsample' if down else 'upsample'}.conv", last, last, 3)
        first, middle, second = MIDDLE[names]
        for inner in (first, second):
            block(f"{at('mid', 0)}.{inner}", WIDTHS[-1], WIDTHS[-1])
        attn(f"{at('mid', 0)}.{middle}", WIDTHS[-1])
        norm(f"{half}.norm_out", WIDTHS[-1] if down else WIDTHS[0])
        conv(f"{half}.conv_out", WIDTHS[-1] if down else WIDTHS[0], LATENT if down else 3, 3)
    width = LATENT if gumbel else CODE_WIDTH
    conv("quant_conv", LATENT, width, 1), conv("post_quant_conv", width, LATENT, 1)
    if gumbel:
        conv("quantize.proj", width, CODES, 1)
    book = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    state[book] = torch.randn(CODES, width, generator=generator)
    return state


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    spread = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, keepdim=True, correction=0) + 1e-6
    ).sqrt()
    return (
        spread.reshape(x.shape) * state[f"{name}.weight"][:, None, None]
        + state[f"{name}.bias"][:, None, None]
    )


def _conv(x: Tensor, state: State, name: str, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _block(x: Tensor, state: State, name: str) -> Tensor:
    inner = x
    for i in (1, 2):
        inner = _norm(inner, state, f"{name}.norm{i}")
        inner = _conv(inner * inner.sigmoid(), state, f"{name}.conv{i}", padding=1)
    return inner + (_conv(x, state, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x)


def _attn(x: Tensor, state: State, name: str) -> Tensor:
    normed = _norm(x, state, f"{name}.norm")
    q, k, v = (_conv(normed, state, f"{name}.{part}").flatten(2) for part in "qkv")  # (B, C, places)
    weights = torch.einsum("bci,bcj->bij", q, k).div(x.shape[1] ** 0.5).softmax(dim=2)
    return x + _conv(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), state, f"{name}.proj_out")


def _half(x: Tensor, state: State, half: str, names) -> Tensor:
    at, down = names(half), half == "encoder"

    def middle(x: Tensor) -> Tensor:
        for inner, apply in zip(MIDDLE[names], (_block, _attn, _block), strict=True):
            x = apply(x, state, f"{at('mid', 0)}.{inner}")
        return x

    x = _conv(x, state, f"{half}.conv_in", padding=1)
    x = x if down else middle(x)
    for level in range(LEVELS) if down else reversed(range(LEVELS)):
        i = 0
        while f"{at('block', level)}.{i}.conv1.weight" in state:
            x = _block(x, state, f"{at('block', level)}.{i}")
            if f"{at('attn', level)}.{i}.q.weight" in state:
                x = _attn(x, state, f"{at('attn', level)}.{i}")
            i += 1
        name = f"{at('resize', level)}.{'downsample' if down else 'upsample'}.conv"
        if f"{name}.weight" in state and down:
            x = _conv(F.pad(x, (0, 1, 0, 1)), state, name, stride=2)
        elif f"{name}.weight" in state:
            x = _conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), state, name, padding=1)
    x = _norm(middle(x) if down else x, state, f"{half}.norm_out")
    return _conv(x * x.sigmoid(), state, f"{half}.conv_out", padding=1)


def vectors(pixels: Tensor, state: State, names) -> Tensor:
    """Pixels in [0, 1] -> what stands before the codebook, (B, D, h, w)."""
    return _conv(_half(pixels * 2 - 1, state, "encoder", names), state, "quant_conv")


def image(codes: Tensor, state: State, names) -> Tensor:
    """Code vectors (B, D, h, w) -> pixels in [0, 1]."""
    return (decoded(codes, state, names) / 2 + 0.5).clamp(0, 1)


def decoded(codes: Tensor, state: State, names) -> Tensor:
    """Code vectors (B, D, h, w) -> what the decoder gives."""
    return _half(_conv(codes, state, "post_quant_conv"), state, "decoder", names)
