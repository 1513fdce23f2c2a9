"""minDALL-E written out over the tensors of its file, slot by slot; and its folder at small width.

Nothing of it is shared with dalle/pretrained: it follows the description of the published model.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.vqgan_reference import CODES, make_state, names_of_taming

State = dict[str, Tensor]
WIDTH, DEPTH, HEADS, TEXT, SIDE = 24, 3, 4, 7, 4
CAPTIONS = [
    f"A {color} {shape} on the {place}, café"
    for color in ("red", "blue", "golden")
    for shape in ("circle", "square")
    for place in ("beach", "mountain")
]
HPARAMS: dict[str, Any] = {
    "embed_dim": WIDTH,
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "n_dense_layers": DEPTH,
    "ctx_len_img": SIDE * SIDE,
    "ctx_len_txt": TEXT,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "mlp_bias": True,
    "attn_bias": True,
    "gelu_use_approx": False,
}


def make_weights(words: int, **changed: Any) -> State:
    """Random tensors under the names that its modules give, norms and biases too."""
    h, draws, state = HPARAMS | changed, torch.Generator().manual_seed(0), {}

    def put(name: str, *shape: int, around: float = 0.0, size: float = 0.3) -> None:
        state[name] = around + size * torch.randn(*shape, generator=draws)

    def norm(name: str) -> None:
        put(f"{name}.weight", WIDTH, around=1.0), put(f"{name}.bias", WIDTH)

    def linear(name: str, n_out: int, n_in: int, bias: bool) -> None:
        put(f"{name}.weight", n_out, n_in)
        if bias:
            put(f"{name}.bias", n_out)

    put("tok_emb_img.weight", CODES, WIDTH), put("tok_emb_txt.weight", words, WIDTH)
    put("pos_emb_img.weight", SIDE * SIDE, WIDTH), put("pos_emb_txt.weight", TEXT, WIDTH)
    for i in range(DEPTH):
        norm(f"blocks.{i}.ln1"), norm(f"blocks.{i}.ln2")
        for part in ("key", "query", "value", "proj"):
            linear(f"blocks.{i}.attn.{part}", WIDTH, WIDTH, h["attn_bias"])
        linear(f"blocks.{i}.mlp.0", 4 * WIDTH, WIDTH, h["mlp_bias"])
        linear(f"blocks.{i}.mlp.2", WIDTH, 4 * WIDTH, h["mlp_bias"])
    norm("ln_f")
    linear("head_img", CODES, WIDTH, False), linear("head_txt", words, WIDTH, False)
    return state


def logits(state: State, text: list[int], image: list[int], **changed: Any) -> tuple[Tensor, Tensor]:
    """Text ids (T) and image tokens -> logits of text ids 1 .. T - 1, and of image tokens 0 .. n."""
    h = HPARAMS | changed
    x = torch.stack(
        [
            state["tok_emb_txt.weight"][token] + state["pos_emb_txt.weight"][at]
            for at, token in enumerate(text)
        ]
        + [
            state["tok_emb_img.weight"][token] + state["pos_emb_img.weight"][at]
            for at, token in enumerate(image)
        ]
    )

    def normed(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(1))

    def gelu(x: Tensor) -> Tensor:
        return (
            x * (1.702 * x).sigmoid() if h["gelu_use_approx"] else x * (1 + torch.erf(x / math.sqrt(2))) / 2
        )

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (
            linear(x, f"{name}.{part}").unflatten(1, (h["n_heads"], -1)) for part in ("query", "key", "value")
        )
        out = []
        for slot in range(len(x)):
            weights = torch.einsum("hd,khd->hk", q[slot], k[: slot + 1]) / math.sqrt(WIDTH // h["n_heads"])
            out.append(torch.einsum("hk,khd->hd", weights.softmax(1), v[: slot + 1]).flatten())
        return linear(torch.stack(out), f"{name}.proj")

    for i in range(DEPTH):
        x = x + attention(normed(x, f"blocks.{i}.ln1"), f"blocks.{i}.attn")
        x = x + linear(gelu(linear(normed(x, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0")), f"blocks.{i}.mlp.2")
    x = normed(x, "ln_f")
    return F.linear(x[: TEXT - 1], state["head_txt.weight"]), F.linear(
        x[TEXT - 1 :], state["head_img.weight"]
    )


def train_tokenizer(folder: Path) -> Any:
    """A CharBPETokenizer of its own library, saved as minDALL-E's files are; the one that its program would
    read."""
    from tokenizers import CharBPETokenizer

    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    trained = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    trained.train_from_iterator(
        CAPTIONS, vocab_size=120, special_tokens=["[PAD]", "[UNK]"], show_progress=False
    )
    vocabulary, merges = trained.save_model(str(folder / "tokenizer"))
    Path(vocabulary).rename(folder / "tokenizer/bpe-16k-vocab.json")
    Path(merges).rename(folder / "tokenizer/bpe-16k-merges.txt")
    return published_tokenizer(folder)


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
    """All its files at small width; the transformer's tensors."""
    train_tokenizer(folder)
    words = len(json.loads((folder / "tokenizer/bpe-16k-vocab.json").read_text()))
    write_config(folder, words, **changed)
    state = make_weights(words, **changed)
    torch.save({"state_dict": state}, folder / "stage2_last.ckpt")
    torch.save({"state_dict": make_state(names_of_taming)}, folder / "stage1_last.ckpt")
    return state


def write_config(folder: Path, words: int, **changed: Any) -> None:
    """config.yaml as it is published, with small numbers; `changed` may name hparams, or keys of stage2."""
    stage2 = {"type": "transformer1d", "vocab_size_txt": words, "vocab_size_img": CODES}
    stage2 |= {name: value for name, value in changed.items() if name in stage2}
    hparams = HPARAMS | {name: value for name, value in changed.items() if name not in stage2}
    lines = ["stage1:", "  type: vqgan", "stage2:", *(f"  {name}: {value}" for name, value in stage2.items())]
    lines += ["  hparams:", *(f"    {name}: {value}" for name, value in hparams.items() if value is not None)]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
