"""Reference of VQGAN over the tensors of taming-transformers' files, and such files; shares no code."""

import re

import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State

WIDTHS, LATENT, CODES, CODE_WIDTH = (32, 64, 64), 8, 20, 6
LEVELS = range(len(WIDTHS))


def make_state(blocks: int = 1, attention: tuple[int, ...] = (2,), gumbel: bool = False) -> State:
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

    for half, levels, more in (("encoder.down", LEVELS, 0), ("decoder.up", LEVELS[::-1], 1)):
        name, width = half.split(".")[0], WIDTHS[levels[0]]
        conv(f"{name}.conv_in", LATENT if more else 3, width, 3)
        for level in levels:
            for i in range(blocks + more):
                block(f"{half}.{level}.block.{i}", width, WIDTHS[level])
                width = WIDTHS[level]
                if level in attention:
                    attn(f"{half}.{level}.attn.{i}", width)
            if level != levels[-1]:
                conv(f"{half}.{level}.{'upsample' if more else 'downsample'}.conv", width, width, 3)
        block(f"{name}.mid.block_1", WIDTHS[-1], WIDTHS[-1])
        attn(f"{name}.mid.attn_1", WIDTHS[-1])
        block(f"{name}.mid.block_2", WIDTHS[-1], WIDTHS[-1])
        state.norm(f"{name}.norm_out", width)
        conv(f"{name}.conv_out", width, 3 if more else LATENT, 3)
    width = LATENT if gumbel else CODE_WIDTH
    conv("quant_conv", LATENT, width, 1)
    conv("post_quant_conv", width, LATENT, 1)
    if gumbel:
        conv("quantize.proj", width, CODES, 1)
    state.put("quantize.embed.weight" if gumbel else "quantize.embedding.weight", CODES, width)
    return dict(state)


def as_llamagen(state: State) -> State:
    """The tensors under LlamaGen's names; its decoder counts from the coarsest level."""
    middle, renamed = {"block_1": 0, "attn_1": 1, "block_2": 2}, {}
    for name, tensor in state.items():
        name = re.sub(r"\.mid\.(\w+)", lambda m: f".mid.{middle[m[1]]}", name)
        name = re.sub(r"\.up\.(\d)", lambda m: f".conv_blocks.{LEVELS[-1] - int(m[1])}", name)
        renamed[name.replace(".down.", ".conv_blocks.").replace(".block.", ".res.")] = tensor
    return renamed


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


def _middle(x: Tensor, state: State, name: str) -> Tensor:
    x = _attn(_block(x, state, f"{name}.mid.block_1"), state, f"{name}.mid.attn_1")
    return _block(x, state, f"{name}.mid.block_2")


def _level(x: Tensor, state: State, name: str) -> Tensor:
    i = 0
    while f"{name}.block.{i}.conv1.weight" in state:
        x = _block(x, state, f"{name}.block.{i}")
        if f"{name}.attn.{i}.q.weight" in state:
            x = _attn(x, state, f"{name}.attn.{i}")
        i += 1
    return x


def vectors(pixels: Tensor, state: State) -> Tensor:
    """Pixels in [0, 1] -> what stands before the codebook, (B, D, h, w)."""
    x = _conv(pixels * 2 - 1, state, "encoder.conv_in", padding=1)
    for level in LEVELS:
        x = _level(x, state, f"encoder.down.{level}")
        if level < LEVELS[-1]:
            x = _conv(F.pad(x, (0, 1, 0, 1)), state, f"encoder.down.{level}.downsample.conv", stride=2)
    x = F.silu(_norm(_middle(x, state, "encoder"), state, "encoder.norm_out"))
    return _conv(_conv(x, state, "encoder.conv_out", padding=1), state, "quant_conv")


def decoded(codes: Tensor, state: State) -> Tensor:
    """Code vectors (B, D, h, w) -> what the decoder gives."""
    x = _conv(_conv(codes, state, "post_quant_conv"), state, "decoder.conv_in", padding=1)
    x = _middle(x, state, "decoder")
    for level in reversed(LEVELS):
        x = _level(x, state, f"decoder.up.{level}")
        if level > 0:
            x = _conv(F.interpolate(x, scale_factor=2), state, f"decoder.up.{level}.upsample.conv", padding=1)
    return _conv(F.silu(_norm(x, state, "decoder.norm_out")), state, "decoder.conv_out", padding=1)


def image(codes: Tensor, state: State) -> Tensor:
    """Code vectors (B, D, h, w) -> pixels in [0, 1]."""
    return (decoded(codes, state) / 2 + 0.5).clamp(0, 1)
