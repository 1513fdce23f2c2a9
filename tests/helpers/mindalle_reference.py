"""Reference of minDALL-E over the tensors of its file, and its folder at small width; shares no code."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State, attend, layer_norm, linear
from tests.helpers.vqgan_reference import CODES, make_state

WIDTH, DEPTH, HEADS, TEXT, SIDE = 24, 3, 4, 7, 4
WORDS = ("red", "blue", "golden"), ("circle", "square"), ("beach", "mountain")
CAPTIONS = [f"A {color} {shape} on the {place}, café" for color, shape, place in product(*WORDS)]
HPARAMS: dict[str, Any] = {
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "attn_pdrop": 0.0,
    "mlp_bias": True,
    "attn_bias": True,
    "gelu_use_approx": False,
}


def make_weights(words: int, **changed: Any) -> State:
    """Random tensors under the names that its modules give."""
    h, state = HPARAMS | changed, RandomState()
    state.put("tok_emb_img.weight", CODES, WIDTH)
    state.put("tok_emb_txt.weight", words, WIDTH)
    state.put("pos_emb_img.weight", SIDE * SIDE, WIDTH)
    state.put("pos_emb_txt.weight", TEXT, WIDTH)
    for i in range(h["n_layers"]):
        for norm in ("ln1", "ln2"):
            state.norm(f"blocks.{i}.{norm}", WIDTH)
        for part in ("key", "query", "value", "proj"):
            state.linear(f"blocks.{i}.attn.{part}", WIDTH, WIDTH, bias=h["attn_bias"])
        state.linear(f"blocks.{i}.mlp.0", 4 * WIDTH, WIDTH, bias=h["mlp_bias"])
        state.linear(f"blocks.{i}.mlp.2", WIDTH, 4 * WIDTH, bias=h["mlp_bias"])
    state.norm("ln_f", WIDTH)
    state.linear("head_img", CODES, WIDTH, bias=False)
    state.linear("head_txt", words, WIDTH, bias=False)
    return dict(state)


def logits(state: State, text: list[int], image: list[int], **changed: Any) -> tuple[Tensor, Tensor]:
    """Text ids (T) and image tokens -> logits of text ids 1 .. T - 1, and of image tokens 0 .. n."""
    h = HPARAMS | changed
    of_text = state["tok_emb_txt.weight"][text] + state["pos_emb_txt.weight"][: len(text)]
    of_image = state["tok_emb_img.weight"][image] + state["pos_emb_img.weight"][: len(image)]
    x = torch.cat([of_text, of_image])

    def gelu(x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid() if h["gelu_use_approx"] else F.gelu(x)

    def attention(x: Tensor, name: str) -> Tensor:
        parts = (linear(x, state, f"{name}.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(1, (h["n_heads"], -1)) for part in parts)
        return linear(attend(q, k, v, lambda query, key: key <= query), state, f"{name}.proj")

    for i in range(DEPTH):
        x = x + attention(layer_norm(x, state, f"blocks.{i}.ln1"), f"blocks.{i}.attn")
        inner = gelu(linear(layer_norm(x, state, f"blocks.{i}.ln2"), state, f"blocks.{i}.mlp.0"))
        x = x + linear(inner, state, f"blocks.{i}.mlp.2")
    x = layer_norm(x, state, "ln_f")
    return linear(x[: TEXT - 1], state, "head_txt"), linear(x[TEXT - 1 :], state, "head_img")


def train_tokenizer(folder: Path) -> int:
    """Writes a CharBPETokenizer as minDALL-E's files; its vocabulary size."""
    from tokenizers import CharBPETokenizer

    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    trained = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    special = ["[PAD]", "[UNK]"]
    trained.train_from_iterator(CAPTIONS, vocab_size=120, special_tokens=special, show_progress=False)
    vocabulary, merges = trained.save_model(str(folder / "tokenizer"))
    Path(vocabulary).rename(folder / "tokenizer/bpe-16k-vocab.json")
    Path(merges).rename(folder / "tokenizer/bpe-16k-merges.txt")
    return trained.get_vocab_size()


def published_tokenizer(folder: Path) -> Any:
    """The tokenizer as its program builds it from the files."""
    from tokenizers import CharBPETokenizer

    files = (str(folder / f"tokenizer/bpe-16k-{name}") for name in ("vocab.json", "merges.txt"))
    tokenizer = CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True, dropout=None)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.enable_padding(length=TEXT, pad_id=tokenizer.token_to_id("[PAD]"))
    tokenizer.enable_truncation(max_length=TEXT)
    return tokenizer


def write_folder(folder: Path, **changed: Any) -> State:
    """All its files at small width, config.yaml as it is published; the transformer's tensors."""
    words = train_tokenizer(folder)
    stage2 = {"type": "transformer1d", "vocab_size_txt": words, "vocab_size_img": CODES}
    config = {"stage1": {"type": "vqgan"}, "stage2": stage2 | {"hparams": HPARAMS | changed}}
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML
    state = make_weights(words, **changed)
    torch.save({"state_dict": state}, folder / "stage2_last.ckpt")
    torch.save({"state_dict": make_state()}, folder / "stage1_last.ckpt")
    return state
