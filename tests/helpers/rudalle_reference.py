"""Reference of ruDALL-E, both versions, over the tensors of its file, and small files; shares no code."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State, attend, layer_norm, linear

WIDTH, DEPTH, HEADS, TEXT, SIDE, WORDS, CODES = 16, 4, 2, 6, 12, 30, 20  # a grid wider than the square of 11
IMAGE_LEN = SIDE * SIDE
MASKS = ("row_mask", "col_mask", "conv_mask")


def kind_of(layer: int, depth: int) -> str:
    """Which of MASKS a layer is under."""
    if (layer - 1) % 4 == 0:
        return "col_mask"
    return "conv_mask" if layer == depth - 1 else "row_mask"


def sees(mask: str, version: str, q: int, k: int) -> bool:
    """Whether position q sees position k, where the masks begin to count the image at position TEXT."""
    if k > q or k < TEXT:
        return k <= q
    (row, column), (other, near) = divmod(q - TEXT, SIDE), divmod(k - TEXT, SIDE)
    if mask == "row_mask":
        return q - k <= SIDE
    if mask == "col_mask":
        return column == near
    if version == "v3":
        return abs(row - other) <= 5 and abs(column - near) <= 5
    around = range(-5, 6)
    return row in [(other + r) % SIDE for r in around] and column in [(near + c) % SIDE for c in around]


def make_weights(
    version: str, depth: int = DEPTH, sandwich: bool = True, at_top: bool = False, gain: float = 1.0
) -> State:
    """Random tensors under the names that the package's modules give, and its masks.

    `gain` multiplies the outputs of attention in the last layer.
    """
    state = RandomState()
    state.put("text_embeddings.weight", WORDS + TEXT, WIDTH)
    state.put("image_embeddings.weight", CODES, WIDTH)
    state.put("text_pos_embeddings.weight", TEXT + 1, WIDTH)
    state.put("image_row_embeddings.weight", SIDE, WIDTH)
    state.put("image_col_embeddings.weight", SIDE, WIDTH)
    state.norm("to_logits.0", WIDTH)
    state.linear("to_logits.1", WORDS + TEXT + CODES, WIDTH)
    norms = ["input", "post_attention"]
    if sandwich:
        norms += ["before_first_addition", "before_second_addition"]
    for i in range(depth):
        at = f"transformer.layers.{i}"
        for norm in norms:
            state.norm(f"{at}.{norm}_layernorm", WIDTH)
        state.linear(f"{at}.attention.query_key_value", 3 * WIDTH, WIDTH)
        state.linear(f"{at}.attention.dense", WIDTH, WIDTH)
        state.linear(f"{at}.mlp.dense_h_to_4h", 4 * WIDTH, WIDTH)
        state.linear(f"{at}.mlp.dense_4h_to_h", WIDTH, 4 * WIDTH)
    for end in ("weight", "bias"):
        state[f"{at}.attention.dense.{end}"] *= gain
    state.norm("transformer.final_layernorm", WIDTH)
    prefix = "" if at_top else "transformer."
    return dict(state) | {f"{prefix}{mask}": table(mask, version).clone() for mask in MASKS}


@cache
def table(mask: str, version: str) -> Tensor:
    """1 where a position sees a position, else 0."""
    positions = range(TEXT + IMAGE_LEN)
    return torch.tensor([[sees(mask, version, q, k) for k in positions] for q in positions]).float()


def logits(state: State, version: str, text: list[int], image: list[int]) -> Tensor:
    """Text ids (T, zeros after the caption) and image tokens -> (positions, V)."""
    words = [WORDS + position if token == 0 else token for position, token in enumerate(text)]
    words = [2, *words] if version == "v2" else words
    of_text = state["text_embeddings.weight"][words] + state["text_pos_embeddings.weight"][: len(words)]
    row, column = torch.arange(len(image)) // SIDE, torch.arange(len(image)) % SIDE
    places = state["image_row_embeddings.weight"][row] + state["image_col_embeddings.weight"][column]
    of_image = state["image_embeddings.weight"][image] + places
    x = torch.cat([of_text, of_image])[: TEXT + IMAGE_LEN]
    depth = sum(name.endswith("attention.dense.bias") for name in state)

    def attention(x: Tensor, i: int) -> Tensor:
        name, kind = f"transformer.layers.{i}.attention", kind_of(i, depth)
        parts = linear(x, state, f"{name}.query_key_value").split(WIDTH, dim=1)
        q, k, v = (part.view(len(x), HEADS, -1) for part in parts)
        mixed = attend(q, k, v, lambda query, key: sees(kind, version, query, key))
        return linear(mixed, state, f"{name}.dense").clamp(-65504, 65504)

    def mlp(x: Tensor, i: int) -> Tensor:
        inner = linear(x, state, f"transformer.layers.{i}.mlp.dense_h_to_4h")
        return linear(F.gelu(inner, approximate="tanh"), state, f"transformer.layers.{i}.mlp.dense_4h_to_h")

    for i in range(depth):
        for path, before, after in ((attention, "input", "first"), (mlp, "post_attention", "second")):
            at = f"transformer.layers.{i}"
            added = path(layer_norm(x, state, f"{at}.{before}_layernorm"), i)
            if f"{at}.before_{after}_addition_layernorm.weight" in state:
                added = layer_norm(added, state, f"{at}.before_{after}_addition_layernorm")
            x = x + added
    x = layer_norm(layer_norm(x, state, "transformer.final_layernorm"), state, "to_logits.0")
    return linear(x, state, "to_logits.1")


BPE = "4 1\n9601 4\n97 5\n98 6\n1078 7\n5 6 8\n1 0 2 3\n"
"""A youtokentome model: the word mark, a, b and ж, and one merge, "ab"."""
