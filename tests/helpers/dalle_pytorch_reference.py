"""DALLE-pytorch 1.6.6 written out over the tensors of its file, slot by slot; and such files at small width.

Nothing of it is shared with dalle/pretrained: it follows the package's description. Where the package is
installed, tests hold this reference equal to it.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
HPARAMS: dict[str, Any] = {
    "num_text_tokens": 30,
    "text_seq_len": 6,
    "dim": 16,
    "depth": 5,
    "heads": 3,
    "dim_head": 12,
    "reversible": False,
    "loss_img_weight": 7,
    "attn_types": ("full", "axial_row", "axial_col", "conv_like"),
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "stable": False,
    "shift_tokens": True,
    "rotary_emb": True,
    "shared_attn_ids": None,
    "shared_ff_ids": None,
    "share_input_output_emb": False,
}
VAE = {
    "image_size": 24,
    "num_tokens": 24,
    "codebook_dim": 12,
    "num_layers": 2,
    "num_resnet_blocks": 1,
    "hidden_dim": 8,
}
SIDE, TEXT, WORDS, CODES = 6, 6, 30, 24  # a grid wider than the 5 of the convolution


def make_weights(**changed: Any) -> State:
    """Random tensors under the names that the package's modules give, with its wrappers; the dVAE's too."""
    h = HPARAMS | changed
    draws, state = torch.Generator().manual_seed(0), {}

    def put(name: str, *shape: int, around: float = 0.0, size: float = 0.3) -> None:
        state[name] = around + size * torch.randn(*shape, generator=draws)

    def norm(name: str) -> None:
        put(f"{name}.weight", width, around=1.0), put(f"{name}.bias", width)

    width, inner, vocab = h["dim"], h["heads"] * h["dim_head"], WORDS + TEXT + CODES
    if h["rotary_emb"]:
        state["transformer.pos_emb"] = angles(h["dim_head"])
    else:
        put("text_pos_emb.weight", TEXT + 1, width)
        put("image_pos_emb.weights.0", 1, SIDE, 1, width), put("image_pos_emb.weights.1", 1, 1, SIDE, width)
    norm("to_logits.0"), put("to_logits.1.weight", vocab, width), put("to_logits.1.bias", vocab)
    if h["share_input_output_emb"]:
        for name in ("text_emb", "image_emb"):
            state[f"{name}.linear.weight"], state[f"{name}.linear.bias"] = (
                state["to_logits.1.weight"],
                state["to_logits.1.bias"],
            )
    else:
        put("text_emb.weight", WORDS + TEXT, width), put("image_emb.weight", CODES, width)
    depth_of_fn = "fn." * (2 if h["shift_tokens"] else 0)
    for i in range(h["depth"]):
        for path in (0, 1):
            at = f"blocks.{i}.{'fg'[path]}.net" if h["reversible"] else f"layers.{i}.{path}"
            at = f"transformer.layers.{at}"
            put(f"{at}.scale", 1, 1, width, around=0.8)
            norm(f"{at}.fn.norm")
            if h.get("sandwich_norm"):
                norm(f"{at}.fn.norm_out")
            inside = f"{at}.fn.fn.{depth_of_fn}"
            if path == 0:
                put(f"{inside}fn.to_qkv.weight", 3 * inner, width)
                put(f"{inside}fn.to_out.0.weight", width, inner), put(f"{inside}fn.to_out.0.bias", width)
            else:
                put(f"{inside}net.0.weight", 8 * width, width), put(f"{inside}net.0.bias", 8 * width)
                put(f"{inside}net.3.weight", width, 4 * width), put(f"{inside}net.3.bias", width)
    (
        put("vae.codebook.weight", CODES, 12),
        put("vae.decoder.0.weight", 8, 12, 1, 1),
        put("vae.decoder.0.bias", 8),
    )
    convs = {
        "encoder.0.0": (8, 3, 4),
        "encoder.1.0": (8, 8, 4),
        "encoder.3": (CODES, 8, 1),
        "decoder.2.0": (8, 8, 4),
        "decoder.3.0": (8, 8, 4),
        "decoder.4": (3, 8, 1),
    }
    convs |= {
        f"{at}.net.{i}": (8, 8, 1 if i == 4 else 3) for at in ("encoder.2", "decoder.1") for i in (0, 2, 4)
    }
    for name, (n_out, n_in, kernel) in convs.items():
        put(f"vae.{name}.weight", n_out, n_in, kernel, kernel), put(f"vae.{name}.bias", n_out)
    return state


def make_file(weights: State, **changed: Any) -> dict[str, Any]:
    """What its training script writes."""
    about = {"hparams": HPARAMS | changed, "vae_params": VAE, "epoch": 0, "version": "1.6.6"}
    about |= {
        "vae_class_name": "DiscreteVAE",
        "opt_state": {"state": {}, "param_groups": []},
        "scheduler_state": None,
    }
    return about | {"weights": weights}


def angles(head_dim: int) -> Tensor:
    """(1, 1 + T + N, r): by place in text, by row, by column."""
    r = head_dim // 3
    slow = 1 / 10000 ** (torch.arange(0, r, 2)[: r // 2].float() / r)
    fast = torch.linspace(1.0, 5.0, r // 2) * torch.pi
    side = torch.linspace(-1, 1, SIDE)
    places = []
    for slot in range(1 + TEXT + SIDE * SIDE):
        image = slot - TEXT - 1
        row, column = (side[image // SIDE], side[image % SIDE]) if image >= 0 else (-10.0, -10.0)
        parts = [(slot if image < 0 else 8192) * slow, row * fast, column * fast]
        places.append(torch.cat([part.repeat_interleave(2) for part in parts]))
    return torch.stack(places)[None]


def sees(kind: str, q: int, k: int) -> bool:
    """Whether slot q sees slot k: the start, T words, image tokens."""
    if k > q or k <= TEXT or kind == "full":
        return k <= q
    (row, column), (other, beside) = divmod(q - TEXT - 1, SIDE), divmod(k - TEXT - 1, SIDE)
    if kind == "conv_like":
        return row - other in range(5) and column - beside in range(5)
    return row == other if kind == "axial_row" else column == beside


def mixed(x: Tensor) -> Tensor:
    """The shift, (n, D) slot by slot."""
    out, half, quarter = x.clone(), x.shape[1] // 2, x.shape[1] // 4
    for slot in range(len(x)):
        image = slot - TEXT - 1
        if image < 0:
            out[slot, :half] = x[slot - 1, :half] if slot else 0
        else:
            out[slot, :quarter] = x[slot - SIDE, :quarter] if image >= SIDE else 0
            out[slot, quarter:half] = x[slot - 1, quarter:half] if image % SIDE else 0
    return out


def logits(state: State, text: list[int], image: list[int], **changed: Any) -> Tensor:
    """Text ids (T, zeros behind the caption) and image tokens -> (1 + T + n less the last, V) of one
    stream."""
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
    found = {}  # by layer, path and the end of the name
    for name, tensor in state.items():
        if match := re.match(
            r"transformer\.layers\.(?:layers|blocks)\.(\d+)\.([01fg])\.(?:net\.(?!\d))?(?:fn\.)*(.+)", name
        ):
            found[int(match[1]), "0f1g".index(match[2]) // 2, match[3]] = tensor

    def normed(x: Tensor, name: tuple[int, int, str]) -> Tensor:
        i, path, end = name
        return F.layer_norm(x, x.shape[-1:], found[i, path, f"{end}.weight"], found[i, path, f"{end}.bias"])

    def added(i: int, path: int, x: Tensor) -> Tensor:
        x = normed(x, (i, path, "norm"))
        x = mixed(x) if h["shift_tokens"] else x
        x = attention(i, x) if path == 0 else feed_forward(i, x)
        x = normed(x, (i, path, "norm_out")) if h.get("sandwich_norm") else x
        return x * found[i, path, "scale"][0]

    def feed_forward(i: int, x: Tensor) -> Tensor:
        value, gate = F.linear(x, found[i, 1, "net.0.weight"], found[i, 1, "net.0.bias"]).chunk(2, dim=1)
        return F.linear(value * F.gelu(gate), found[i, 1, "net.3.weight"], found[i, 1, "net.3.bias"])

    def attention(i: int, x: Tensor) -> Tensor:
        kind = h["attn_types"][i % len(h["attn_types"])]
        q, k, v = (
            F.linear(x, found[i, 0, "to_qkv.weight"]).view(len(x), 3, h["heads"], -1).unbind(1)
        )  # (n, H, d)
        if h["rotary_emb"]:
            q, k, v = (turned(part) for part in (q, k, v))
        out = []
        for slot in range(len(x)):
            seen = [other for other in range(len(x)) if sees(kind, slot, other)]
            weights = (torch.einsum("hd,khd->hk", q[slot], k[seen]) / h["dim_head"] ** 0.5).softmax(1)
            out.append(torch.einsum("hk,khd->hd", weights, v[seen]).flatten())
        return F.linear(torch.stack(out), found[i, 0, "to_out.0.weight"], found[i, 0, "to_out.0.bias"])

    def turned(x: Tensor) -> Tensor:
        by = state["transformer.pos_emb"][0, : len(x), None, ::2]  # (n, 1, pairs)
        pairs = torch.view_as_complex(x[..., : 2 * by.shape[2]].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(by), by)).flatten(-2)
        return torch.cat([turned, x[..., 2 * by.shape[2] :]], dim=-1)

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
    x = F.layer_norm(x, x.shape[-1:], state["to_logits.0.weight"], state["to_logits.0.bias"])
    return F.linear(x, book, state["to_logits.1.bias"])
