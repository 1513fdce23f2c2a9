"""minDALL-E 1.3B (Kakao Brain): 1.3B.tar.gz, or the folder that it unpacks to.

    config.yaml                        heads, and which GELU: no shape tells them
    tokenizer/bpe-16k-vocab.json       text ids, [PAD] among them; with bpe-16k-merges.txt a CharBPETokenizer
    stage1_last.ckpt                   the image tokenizer, a VQGAN (dalle/pretrained/vqgan.py)
    stage2_last.ckpt                   the transformer

What config.yaml leaves out is as in the published model. Its own model transferred to ImageNet reads no captions and
is refused (dalle/pretrained/refused.py).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from operator import attrgetter
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from torch import Tensor

from dalle.config import ConfigError, read_yaml
from dalle.io.files import read_json
from dalle.pretrained.family import CheckpointFormat, Shapes
from dalle.pretrained.mindalle.model import MinDalle, MinDalleConfig
from dalle.text.external.huggingface import HuggingFaceTokenizer

CONFIG, STAGE1, STAGE2 = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
FILES = (CONFIG, VOCABULARY, MERGES, STAGE1, STAGE2)
UNKNOWN, PAD, SUFFIX = "[UNK]", "[PAD]", "</w>"
LICENCE = (
    "CC-BY-NC-SA 4.0 for the transformer, which forbids commercial use; not stated for its image tokenizer"
)

_OTHERS = {
    "tok_emb_txt": "text_embedding",
    "tok_emb_img": "image_embedding",
    "pos_emb_txt": "text_position",
    "pos_emb_img": "image_position",
    "ln_f": "final",
    "head_txt": "to_text_logits",
    "head_img": "to_logits",
}
_PARTS = {
    "ln1": "attention.norm",
    "ln2": "mlp.norm",
    "attn.query": "attention.f.qkv.0",
    "attn.key": "attention.f.qkv.1",
    "attn.value": "attention.f.qkv.2",
    "attn.proj": "attention.f.out",
    "mlp.0": "mlp.f.expand",
    "mlp.2": "mlp.f.project",
}


def is_folder(path: Path) -> bool:
    """Whether a folder is what the archive unpacks to."""
    return (path / STAGE2).is_file()


def own_name(name: str) -> str:
    """The file's name of a tensor -> the model's."""
    stem, _, end = name.rpartition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
        return f"layers.{match[1]}.{_PARTS.get(match[2], match[2])}.{end}"
    return f"{_OTHERS.get(stem, stem)}.{end}"


@dataclass(frozen=True)
class Told:
    """What the files beside the transformer say of it."""

    stage2: Mapping[str, Any]
    """Part of config.yaml."""
    pad: int
    """The id of [PAD]."""


def read_told(folder: Path) -> Told:
    """What config.yaml and the vocabulary say; ValueError where one is missing or is of another model."""
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"no {CONFIG} in {folder}, which tells what the tensors do not; keep all its files together"
        )
    try:
        config = read_yaml(folder / CONFIG)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    stage2 = config.get("stage2", {}) if isinstance(config, dict) else None
    if not isinstance(stage2, dict) or not isinstance(stage2.get("hparams", {}), dict):
        raise ValueError(f"{CONFIG} has no mapping of the name stage2")
    if (kind := stage2.get("type", "transformer1d")) != "transformer1d":
        raise ValueError(
            f"{CONFIG} tells a model of type {shown(kind):.40}; only transformer1d reads captions"
        )
    return Told(stage2, read_vocabulary(folder / VOCABULARY)[PAD])


def configure(shapes: Shapes, folder: Path) -> MinDalleConfig:
    """Sizes from the shapes, held against config.yaml of the folder; ValueError where they differ."""
    told = read_told(folder)
    text_vocab, width = shapes["text_embedding.weight"]
    slots = shapes["image_position.weight"][0]
    depth = len({match[1] for name in shapes if (match := re.match(r"layers\.(\d+)\.", name))})
    found = {
        "embed_dim": width,
        "n_layers": depth,
        "n_dense_layers": depth,
        "ctx_len_img": slots,
        "ctx_len_txt": shapes["text_position.weight"][0],
        "vocab_size_txt": text_vocab,
        "vocab_size_img": shapes["image_embedding.weight"][0],
    }
    hparams = told.stage2.get("hparams", {})
    for name, size in found.items():
        said = (told.stage2 if name.startswith("vocab") else hparams).get(name, PUBLISHED[name])
        if said != size:
            raise ValueError(f"{CONFIG} tells {name} {shown(said):.40}, the tensors are of {size}")
    if isqrt(slots) ** 2 != slots:
        raise ValueError(f"{slots} image tokens are no square")
    heads = hparams.get("n_heads", PUBLISHED["n_heads"])
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{CONFIG} tells n_heads {shown(heads):.40}, expected a positive number")
    if not 0 <= told.pad < text_vocab:
        raise ValueError(f"{VOCABULARY} numbers {PAD} {told.pad}, the tensors are of {text_vocab} text ids")
    return MinDalleConfig(
        width=width,
        depth=depth,
        heads=heads,
        text_len=found["ctx_len_txt"],
        grid=(isqrt(slots),) * 2,
        text_vocab=text_vocab,
        image_vocab=found["vocab_size_img"],
        pad=told.pad,
        attention_bias=_switch(hparams, "attn_bias", True),
        mlp_bias=_switch(hparams, "mlp_bias", True),
        gelu="sigmoid" if _switch(hparams, "gelu_use_approx", False) else "exact",
    )


PUBLISHED = {
    "embed_dim": 1536,
    "n_layers": 42,
    "n_dense_layers": 42,
    "n_heads": 24,
    "ctx_len_img": 256,
    "ctx_len_txt": 64,
    "vocab_size_txt": 16384,
    "vocab_size_img": 16384,
}
"""What its configuration says where nothing else is said (dalle/utils/config.py there)."""


def _switch(hparams: Mapping[str, Any], name: str, default: bool) -> bool:
    value = hparams.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{CONFIG} tells {name} {shown(value):.40}, expected true or false")
    return value


def read_vocabulary(path: Path) -> dict[str, int]:
    """Tokens and their ids; ValueError for another file, or one without [UNK] and [PAD]."""
    if not path.is_file():
        raise ValueError(f"no {VOCABULARY} in {path.parents[1]}; keep all its files together")
    vocabulary = read_json(path)
    if not isinstance(vocabulary, dict) or any(type(token) is not int for token in vocabulary.values()):
        raise ValueError(f"{path} is no vocabulary: expected tokens and their numbers")
    if missing := [token for token in (UNKNOWN, PAD) if token not in vocabulary]:
        raise ValueError(f"{path} lacks {missing[0]}, which minDALL-E's has")
    return vocabulary


def load_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """Its text tokenizer: the ids of `tokenizers.CharBPETokenizer` with lowercase, less padding.

    Raises:
        ValueError: files that are missing, or of another tokenizer.
    """
    vocabulary = read_vocabulary(folder / VOCABULARY)
    try:
        lines = (folder / MERGES).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / MERGES} cannot be read: {error}") from None
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := [line for line in merges if len(line.split(" ")) != 2]:
        raise ValueError(
            f"{folder / MERGES} has the line {wrong[0]!r:.40}; expected two parts with a space between"
        )
    bert = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False}
    normalizers = [{"type": "BertNormalizer", **bert}, {"type": "Lowercase"}]
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": merges,
        "unk_token": UNKNOWN,
        "end_of_word_suffix": SUFFIX,
    }
    return HuggingFaceTokenizer(
        {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": model,
            "added_tokens": [
                {"id": vocabulary[token], "content": token, "special": True} for token in (UNKNOWN, PAD)
            ],
        }
    )


def _settle(
    family: CheckpointFormat, path: Path, tree: Any, tensors: Mapping[str, Tensor]
) -> CheckpointFormat:
    return replace(family, configure=partial(configure, folder=path.parent))


FAMILY = CheckpointFormat(
    name="minDALL-E",
    kind="transformer",
    licence=LICENCE,
    marks=("tok_emb_txt.weight", "tok_emb_img.weight", "head_img.weight", "blocks.*.attn.query.weight"),
    configure=partial(configure, folder=Path()),
    build=MinDalle,
    vocabulary=attrgetter("vocabulary"),
    rename=own_name,
    ignored=("blocks.*.attn.mask",),
    settle=_settle,
)
