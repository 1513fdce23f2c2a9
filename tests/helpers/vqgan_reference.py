"""Reference of VQGAN over the tensors of a file, by names of taming-transformers or of LlamaGen; such files.

It shares nothing with dalle/vqgan.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State

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
    state = RandomState()

    def conv(name: str, n_in: int, n_out: int, kernel: int) -> None:
        state.linear(name, n_out, n_in, kernel, kernel)
        state[f"{name}.weight"] /= 0.3 * n_in**0.5 * kernel

    def block(name: str, n_in: int, n_out: int) -> None:
        for i, width in ((1, n_in), (2, n_out)):
            state.norm(f"{name}.norm{i}", width)
            conv(f"{name}.conv{i}", width, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attn(name: str, width: int) -> None:
        state.norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for half in ("encoder", "decoder"):
        at, down = names(half), half == "encoder"
        last, end = (WIDTHS[0], WIDTHS[-1]) if down else (WIDTHS[-1], WIDTHS[0])
        conv(f"{half}.conv_in", 3 if down else LATENT, last, 3)
        for level in range(LEVELS) if down else reversed(range(LEVELS)):
            for i in range(blocks + (not down)):
                block(f"{at('block', level)}.{i}", last, WIDTHS[level])
                last = WIDTHS[level]
                if level in attention:
                    attn(f"{at('attn', level)}.{i}", last)
            if level < LEVELS - 1 if down else level > 0:
                conv(f"{at('resize', level)}.{'downsample' if down else 'upsample'}.conv", last, last, 3)
        first, middle, second = (f"{at('mid', 0)}.{inner}" for inner in MIDDLE[names])
        block(first, WIDTHS[-1], WIDTHS[-1])
        attn(middle, WIDTHS[-1])
        block(second, WIDTHS[-1], WIDTHS[-1])
        state.norm(f"{half}.norm_out", end)
        conv(f"{half}.conv_out", end, LATENT if down else 3, 3)
    width = LATENT if gumbel else CODE_WIDTH
    conv("quant_conv", LATENT, width, 1)
    conv("post_quant_conv", width, LATENT, 1)
    if gumbel:
        conv("quantize.proj", width, CODES, 1)
    state.put("quantize.embed.weight" if gumbel else "quantize.embedding.weight", CODES, width)
    return dict(state)


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def _conv(x: Tensor, state: State, name: str, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _block(x: Tensor, state: State, name: str) -> Tensor:
    inner = x
    for i in (1, 2):
        inner = _conv(F.silu(_norm(inner, state, f"{name}.norm{i}")), state, f"{name}.conv{i}", padding=1)
    return inner + (_conv(x, state, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x)


def _attn(x: Tensor, state: State, name: str) -> Tensor:
    normed = _norm(x, state, f"{name}.norm")
    q, k, v = (_conv(normed, state, f"{name}.{part}").flatten(2).mT for part in "qkv")  # (B, places, C)
    mixed = (q @ k.mT / x.shape[1] ** 0.5).softmax(dim=2) @ v
    return x + _conv(mixed.mT.reshape(x.shape), state, f"{name}.proj_out")


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
        if down and level < LEVELS - 1:
            x = _conv(F.pad(x, (0, 1, 0, 1)), state, f"{at('resize', level)}.downsample.conv", stride=2)
        elif not down and level > 0:
            x = F.interpolate(x, scale_factor=2)
            x = _conv(x, state, f"{at('resize', level)}.upsample.conv", padding=1)
    x = middle(x) if down else x
    return _conv(F.silu(_norm(x, state, f"{half}.norm_out")), state, f"{half}.conv_out", padding=1)


def vectors(pixels: Tensor, state: State, names) -> Tensor:
    """Pixels in [0, 1] -> what stands before the codebook, (B, D, h, w)."""
    return _conv(_half(pixels * 2 - 1, state, "encoder", names), state, "quant_conv")


def image(codes: Tensor, state: State, names) -> Tensor:
    """Code vectors (B, D, h, w) -> pixels in [0, 1]."""
    return (decoded(codes, state, names) / 2 + 0.5).clamp(0, 1)


def decoded(codes: Tensor, state: State, names) -> Tensor:
    """Code vectors (B, D, h, w) -> what the decoder gives."""
    return _half(_conv(codes, state, "post_quant_conv"), state, "decoder", names)
