"""minDALL-E 1.3B (Kakao Brain): 1.3B.tar.gz, or the folder that it unpacks to.

    config.yaml                        heads, and the kind of GELU
    tokenizer/bpe-16k-vocab.json       text ids, [PAD] among them; with bpe-16k-merges.txt a CharBPETokenizer
    stage1_last.ckpt                   the image tokenizer, a VQGAN (dalle/pretrained/vqgan.py)
    stage2_last.ckpt                   the transformer

What config.yaml omits is as in the published model.
"""

import json
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from dalle.config import ConfigError, read_yaml
from dalle.io.files import read_json
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches, rename_layers
from dalle.pretrained.mindalle.model import MinDalle, MinDalleConfig
from dalle.text.external.huggingface import HuggingFaceTokenizer, import_tokenizers

CONFIG, STAGE1, STAGE2 = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
FILES = (CONFIG, VOCABULARY, MERGES, STAGE1, STAGE2)
UNKNOWN, PAD = "[UNK]", "[PAD]"
LICENSE = "CC-BY-NC-SA 4.0 for the transformer (no commercial use); not stated for its image tokenizer"

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
    """Whether a folder is the unpacked archive."""
    return (path / STAGE2).is_file()


def read_hparams(folder: Path) -> dict[str, Any]:
    """The hyper-parameters of the transformer in config.yaml; ValueError if of another model."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no {CONFIG} in {folder}, which has heads and biases")
    try:
        config = read_yaml(folder / CONFIG)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    stage2 = config.get("stage2", {}) if isinstance(config, dict) else None
    hparams = stage2.get("hparams", {}) if isinstance(stage2, dict) else None
    if not isinstance(hparams, dict):
        raise ValueError(f"{CONFIG} has no mapping of the name stage2")
    if (kind := stage2.get("type", "transformer1d")) != "transformer1d":
        raise ValueError(f"{CONFIG} has a model of type {shown(kind):.40}; only transformer1d reads captions")
    return hparams


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> MinDalleConfig:
    """Sizes from the shapes, heads, biases and GELU from config.yaml of the folder."""
    folder = found.path.parent
    hparams = read_hparams(folder)
    pad = read_vocabulary(folder / VOCABULARY)[PAD]
    text_vocab, width = shapes["text_embedding.weight"]
    positions = shapes["image_position.weight"][0]
    if isqrt(positions) ** 2 != positions:
        raise ValueError(f"{positions} image tokens are no square")
    heads = hparams.get("n_heads", 24 if width == MinDalleConfig.width else None)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{CONFIG} has n_heads {shown(heads):.40}, expected a positive number")
    if not 0 <= pad < text_vocab:
        raise ValueError(f"{VOCABULARY} numbers {PAD} {pad}, the tensors are of {text_vocab} text ids")
    attention_bias = _switch(hparams, "attn_bias", True)
    return MinDalleConfig(
        width=width,
        depth=count_matches(shapes, "layers.*.attention.norm.weight"),
        heads=heads,
        text_len=shapes["text_position.weight"][0],
        grid=(isqrt(positions),) * 2,
        text_vocab=text_vocab,
        image_vocab=shapes["image_embedding.weight"][0],
        pad=pad,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=_switch(hparams, "mlp_bias", True),
        gelu="sigmoid" if _switch(hparams, "gelu_use_approx", False) else "exact",
    )


def _switch(hparams: Mapping[str, Any], name: str, default: bool) -> bool:
    value = hparams.get(name, default)
    if type(value) is not bool:
        raise ValueError(f"{CONFIG} has {name} {shown(value):.40}, expected true or false")
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
    """Its text tokenizer, `tokenizers.CharBPETokenizer` with lowercase; ValueError for other files."""
    tokenizers, files = import_tokenizers(), (str(folder / VOCABULARY), str(folder / MERGES))
    read_vocabulary(folder / VOCABULARY)
    try:
        theirs = tokenizers.CharBPETokenizer.from_file(*files, unk_token=UNKNOWN, lowercase=True)
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{folder / MERGES} cannot be read: {error}") from None
    theirs.add_special_tokens([UNKNOWN, PAD])
    return HuggingFaceTokenizer(json.loads(theirs.to_str()))


FAMILY = CheckpointFormat(
    name="minDALL-E",
    kind="transformer",
    license=LICENSE,
    key_patterns=(
        "tok_emb_txt.weight",
        "tok_emb_img.weight",
        "head_img.weight",
        "blocks.*.attn.query.weight",
    ),
    infer_config=infer_config,
    build=MinDalle,
    rename=rename_layers(r"blocks\.(\d+)\.(.+)", _PARTS, _OTHERS),
    ignored=("blocks.*.attn.mask",),
)
