"""Reference of DALLE-pytorch 1.6.6 over the tensors of its file, and small files.

It shares nothing with dalle/pretrained. Where the package is installed, tests compare the reference with it.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State, attend, layer_norm, linear

HPARAMS: dict[str, Any] = {
    "num_text_tokens": 30,
    "text_seq_len": 6,
    "dim": 16,
    "depth": 5,
    "heads": 3,
    "dim_head": 12,
    "ff_dropout": 0.0,
    "attn_types": ("full", "axial_row", "axial_col", "conv_like"),
    "shift_tokens": True,
    "rotary_emb": True,
}
HPARAMS |= dict.fromkeys(("reversible", "stable", "share_input_output_emb", "sandwich_norm"), False)
VAE = {"image_size": 24, "num_tokens": 24, "codebook_dim": 12}
VAE |= {"num_layers": 2, "num_resnet_blocks": 1, "hidden_dim": 8}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"!": 0, "a": 1, "b": 2}, "merges": []}}
TOKENIZER |= {"pre_tokenizer": {"type": "WhitespaceSplit"}}
SIDE, TEXT, WORDS, CODES = 6, 6, 30, 24  # a grid wider than the 5 of the convolution


def make_weights(**changed: Any) -> State:
    """Random tensors under the names that the package's modules give, with its wrappers; the dVAE's too."""
    h, state = HPARAMS | changed, RandomState()
    width, inner, vocab = h["dim"], h["heads"] * h["dim_head"], WORDS + TEXT + CODES
    if h["rotary_emb"]:
        state["transformer.pos_emb"] = angles(h["dim_head"])
    else:
        state.put("text_pos_emb.weight", TEXT + 1, width)
        state.put("image_pos_emb.weights.0", 1, SIDE, 1, width)
        state.put("image_pos_emb.weights.1", 1, 1, SIDE, width)
    state.norm("to_logits.0", width)
    state.linear("to_logits.1", vocab, width)
    if h["share_input_output_emb"]:
        for name in ("text_emb", "image_emb"):
            state[f"{name}.linear.weight"] = state["to_logits.1.weight"]
            state[f"{name}.linear.bias"] = state["to_logits.1.bias"]
    else:
        state.put("text_emb.weight", WORDS + TEXT, width)
        state.put("image_emb.weight", CODES, width)
    wrappers = "fn.fn." if h["shift_tokens"] else ""
    for i in range(h["depth"]):
        for branch in (0, 1):
            at = f"blocks.{i}.{'fg'[branch]}.net" if h["reversible"] else f"layers.{i}.{branch}"
            at = f"transformer.layers.{at}"
            state.put(f"{at}.scale", 1, 1, width, around=0.8)
            state.norm(f"{at}.fn.norm", width)
            if h["sandwich_norm"]:
                state.norm(f"{at}.fn.norm_out", width)
            inside = f"{at}.fn.fn.{wrappers}"
            if branch == 0:
                state.linear(f"{inside}fn.to_qkv", 3 * inner, width, bias=False)
                state.linear(f"{inside}fn.to_out.0", width, inner)
            else:
                state.linear(f"{inside}net.0", 8 * width, width)
                state.linear(f"{inside}net.3", width, 4 * width)
    state.put("vae.codebook.weight", CODES, 12)
    convs = {"encoder.0.0": (8, 3, 4), "encoder.1.0": (8, 8, 4), "encoder.3": (CODES, 8, 1)}
    convs |= {"decoder.0": (8, 12, 1), "decoder.2.0": (8, 8, 4), "decoder.3.0": (8, 8, 4)}
    convs |= {"decoder.4": (3, 8, 1)}
    for at in ("encoder.2", "decoder.1"):
        convs |= {f"{at}.net.{i}": (8, 8, 1 if i == 4 else 3) for i in (0, 2, 4)}
    for name, (n_out, n_in, kernel) in convs.items():
        state.linear(f"vae.{name}", n_out, n_in, kernel, kernel)
    return dict(state)


def make_file(weights: State, **changed: Any) -> dict[str, Any]:
    """What its training script writes."""
    about = {"hparams": HPARAMS | changed, "vae_params": VAE, "vae_class_name": "DiscreteVAE"}
    return about | {"version": "1.6.6", "opt_state": {}, "scheduler_state": None, "weights": weights}


def angles(head_dim: int) -> Tensor:
    """(1, 1 + T + N, r): by position in text, by row, by column."""
    r = head_dim // 3
    slow = 1 / 10000 ** (torch.arange(0, r, 2)[: r // 2].float() / r)
    fast = torch.linspace(1.0, 5.0, r // 2) * torch.pi
    side = torch.linspace(-1, 1, SIDE)
    all_angles = []
    for position in range(1 + TEXT + SIDE * SIDE):
        image = position - TEXT - 1
        row, column = (side[image // SIDE], side[image % SIDE]) if image >= 0 else (-10.0, -10.0)
        parts = [(position if image < 0 else 8192) * slow, row * fast, column * fast]
        all_angles.append(torch.cat([part.repeat_interleave(2) for part in parts]))
    return torch.stack(all_angles)[None]


def sees(kind: str, q: int, k: int) -> bool:
    """Whether position q sees position k: the start, T words, image tokens."""
    if k > q or k <= TEXT or kind == "full":
        return k <= q
    (row, column), (other, near) = divmod(q - TEXT - 1, SIDE), divmod(k - TEXT - 1, SIDE)
    if kind == "conv_like":
        return row - other in range(5) and column - near in range(5)
    return row == other if kind == "axial_row" else column == near


def shifted(x: Tensor) -> Tensor:
    """The shift of states (n, D), one position at a time."""
    out, half, quarter = x.clone(), x.shape[1] // 2, x.shape[1] // 4
    for position in range(len(x)):
        image = position - TEXT - 1
        if image < 0:
            out[position, :half] = x[position - 1, :half] if position else 0
        else:
            out[position, :quarter] = x[position - SIDE, :quarter] if image >= SIDE else 0
            out[position, quarter:half] = x[position - 1, quarter:half] if image % SIDE else 0
    return out


def logits(state: State, text: list[int], image: list[int], **changed: Any) -> Tensor:
    """Text ids (T, zeros after the caption) and image tokens (n) -> (T + n, V)."""
    h = HPARAMS | changed
    words = [0] + [WORDS + place if token == 0 else token for place, token in enumerate(text)]
    book = state["to_logits.1.weight"]
    shared = h["share_input_output_emb"]
    of_text = (book if shared else state["text_emb.weight"])[words]
    of_image = (book[WORDS + TEXT :] if shared else state["image_emb.weight"])[image]
    if not h["rotary_emb"]:
        of_text = of_text + state["text_pos_emb.weight"]
        grid = (state["image_pos_emb.weights.0"] + state["image_pos_emb.weights.1"])[0].flatten(0, 1)
        of_image = of_image + grid[: len(image)]
    x = torch.cat([of_text, of_image])[: TEXT + SIDE * SIDE]
    found: State = {}  # by layer, path and the end of the name
    for name, tensor in state.items():
        if match := re.match(r"transformer\.layers\.(?:layers|blocks)\.(\d+)\.([01fg])\.(.+)", name):
            end = re.sub(r"^(net\.(?!\d))?(fn\.)*", "", match[3])
            found[f"{match[1]}.{'0f1g'.index(match[2]) // 2}.{end}"] = tensor

    def added(i: int, path: int, x: Tensor) -> Tensor:
        x = layer_norm(x, found, f"{i}.{path}.norm")
        x = shifted(x) if h["shift_tokens"] else x
        x = attention(i, x) if path == 0 else feed_forward(i, x)
        x = layer_norm(x, found, f"{i}.{path}.norm_out") if h["sandwich_norm"] else x
        return x * found[f"{i}.{path}.scale"][0]

    def feed_forward(i: int, x: Tensor) -> Tensor:
        value, gate = linear(x, found, f"{i}.1.net.0").chunk(2, dim=1)
        return linear(value * F.gelu(gate), found, f"{i}.1.net.3")

    def attention(i: int, x: Tensor) -> Tensor:
        kind = h["attn_types"][i % len(h["attn_types"])]
        qkv = linear(x, found, f"{i}.0.to_qkv").view(len(x), 3, h["heads"], -1)
        q, k, v = (rotated(part) if h["rotary_emb"] else part for part in qkv.unbind(1))  # (n, H, d)
        mixed = attend(q, k, v, lambda query, key: sees(kind, query, key))
        return linear(mixed, found, f"{i}.0.to_out.0")

    def rotated(x: Tensor) -> Tensor:
        by = state["transformer.pos_emb"][0, : len(x), None, ::2]  # (n, 1, pairs)
        pairs = torch.view_as_complex(x[..., : 2 * by.shape[2]].unflatten(-1, (-1, 2)).contiguous())
        rotated = torch.view_as_real(pairs * torch.polar(torch.ones_like(by), by)).flatten(-2)
        return torch.cat([rotated, x[..., 2 * by.shape[2] :]], dim=-1)

    other = x
    for i in range(h["depth"]):
        if h["reversible"]:
            x = x + added(i, 0, other)
            other = other + added(i, 1, x)
        else:
            x = x + added(i, 0, x)
            x = x + added(i, 1, x)
    x = (x + other) / 2 if h["reversible"] else x
    x = x / x.max(dim=1, keepdim=True).values if h["stable"] else x
    return linear(layer_norm(x, state, "to_logits.0"), state, "to_logits.1")
