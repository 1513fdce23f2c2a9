"""ruDALL-E written out over the tensors of its file, slot by slot, in both versions; and such files at small
width.

Nothing of it is shared with dalle/pretrained: it follows the package's description.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
WIDTH, DEPTH, HEADS, TEXT, SIDE, WORDS, CODES = 16, 4, 2, 6, 12, 30, 20  # a grid wider than the square of 11
IMAGE_LEN = SIDE * SIDE
MASKS = ("row_mask", "col_mask", "conv_mask")


def kind_of(layer: int, depth: int) -> str:
    """Which of MASKS a layer is under."""
    if (layer - 1) % 4 == 0:
        return "col_mask"
    return "conv_mask" if layer == depth - 1 else "row_mask"


def sees(mask: str, version: str, q: int, k: int) -> bool:
    """Whether slot q sees slot k, where the masks begin to count the image at slot TEXT."""
    if k > q or k < TEXT:
        return k <= q
    (row, column), (other, beside) = divmod(q - TEXT, SIDE), divmod(k - TEXT, SIDE)
    if mask == "row_mask":
        return q - k <= SIDE
    if mask == "col_mask":
        return column == beside
    if version == "v3":
        return abs(row - other) <= 5 and abs(column - beside) <= 5
    around = range(-5, 6)
    return row in [(other + r) % SIDE for r in around] and column in [(beside + c) % SIDE for c in around]


def make_weights(version: str, depth: int = DEPTH, sandwich: bool = True, at_top: bool = False) -> State:
    """Random tensors under the names that the package's modules give, norms and biases too, and its masks."""
    draws, state = torch.Generator().manual_seed(0), {}

    def put(name: str, *shape: int, around: float = 0.0, size: float = 0.3) -> None:
        state[name] = around + size * torch.randn(*shape, generator=draws)

    def norm(name: str) -> None:
        put(f"{name}.weight", WIDTH, around=1.0), put(f"{name}.bias", WIDTH)

    def linear(name: str, n_out: int, n_in: int) -> None:
        put(f"{name}.weight", n_out, n_in), put(f"{name}.bias", n_out)

    put("text_embeddings.weight", WORDS + TEXT, WIDTH), put("image_embeddings.weight", CODES, WIDTH)
    put("text_pos_embeddings.weight", TEXT + 1, WIDTH)
    put("image_row_embeddings.weight", SIDE, WIDTH), put("image_col_embeddings.weight", SIDE, WIDTH)
    norm("to_logits.0"), linear("to_logits.1", WORDS + TEXT + CODES, WIDTH)
    for i in range(depth):
        at = f"transformer.layers.{i}"
        norm(f"{at}.input_layernorm"), norm(f"{at}.post_attention_layernorm")
        if sandwich:
            norm(f"{at}.before_first_addition_layernorm"), norm(f"{at}.before_second_addition_layernorm")
        (
            linear(f"{at}.attention.query_key_value", 3 * WIDTH, WIDTH),
            linear(f"{at}.attention.dense", WIDTH, WIDTH),
        )
        (
            linear(f"{at}.mlp.dense_h_to_4h", 4 * WIDTH, WIDTH),
            linear(f"{at}.mlp.dense_4h_to_h", WIDTH, 4 * WIDTH),
        )
    norm("transformer.final_layernorm")
    return state | make_masks(version, "" if at_top else "transformer.")


def make_masks(version: str, prefix: str = "transformer.") -> State:
    """The buffers of a file."""
    return {f"{prefix}{mask}": table(mask, version).clone() for mask in MASKS}


@cache
def table(mask: str, version: str) -> Tensor:
    """1 where a slot sees a slot, else 0."""
    slots = range(TEXT + IMAGE_LEN)
    return torch.tensor([[sees(mask, version, q, k) for k in slots] for q in slots]).float()


def logits(state: State, version: str, text: list[int], image: list[int], depth: int = DEPTH) -> Tensor:
    """Text ids (T, zeros behind the caption) and image tokens -> (slots, V), a row for each slot of the
    stream."""
    words = [WORDS + place if token == 0 else token for place, token in enumerate(text)]
    words = [2, *words] if version == "v2" else words
    x = torch.cat(
        [
            state["text_embeddings.weight"][words] + state["text_pos_embeddings.weight"][: len(words)],
            torch.stack(
                [
                    state["image_embeddings.weight"][token]
                    + state["image_row_embeddings.weight"][at // SIDE]
                    + state["image_col_embeddings.weight"][at % SIDE]
                    for at, token in enumerate(image)
                ]
            ),
        ]
    )[: TEXT + IMAGE_LEN]

    def normed(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(x: Tensor, i: int) -> Tensor:
        name = f"transformer.layers.{i}.attention"
        q, k, v = (
            part.view(len(x), HEADS, -1) for part in linear(x, f"{name}.query_key_value").split(WIDTH, dim=1)
        )
        out = []
        for slot in range(len(x)):
            seen = [other for other in range(slot + 1) if sees(kind_of(i, depth), version, slot, other)]
            weights = (torch.einsum("hd,khd->hk", q[slot], k[seen]) / math.sqrt(WIDTH / HEADS)).softmax(1)
            out.append(torch.einsum("hk,khd->hd", weights, v[seen]).flatten())
        return linear(torch.stack(out), f"{name}.dense").clamp(-65504, 65504)

    for i in range(depth):
        at = f"transformer.layers.{i}"
        added = attention(normed(x, f"{at}.input_layernorm"), i)
        if f"{at}.before_first_addition_layernorm.weight" in state:
            added = normed(added, f"{at}.before_first_addition_layernorm")
        x = x + added
        added = linear(normed(x, f"{at}.post_attention_layernorm"), f"{at}.mlp.dense_h_to_4h")
        added = linear(gelu(added), f"{at}.mlp.dense_4h_to_h")
        if f"{at}.before_second_addition_layernorm.weight" in state:
            added = normed(added, f"{at}.before_second_addition_layernorm")
        x = x + added
    return linear(normed(normed(x, "transformer.final_layernorm"), "to_logits.0"), "to_logits.1")


BPE = "4 1\n9601 4\n97 5\n98 6\n1078 7\n5 6 8\n1 0 2 3\n"
"""A youtokentome model: the word mark, a, b and ж, and one merge, "ab"."""
