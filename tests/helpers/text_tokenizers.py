"""Text tokenizers that Hugging Face's tokenizers and youtokentome train."""

import json
from itertools import product
from pathlib import Path

import pytest

COLORS, SHAPES = ["red", "green", "blue", "yellow"], ["circle", "square", "photograph"]
PLACES = ["under a dog's bowl", "(seen from above)", "in 1984, of 3.5 m"]
PLACES += [" красная", "红色的圆 在左边", "كرة حمراء"]
CAPTIONS = [f"A {c} {s} {p}, the {c2}-{s}!" for c, s, p, c2 in product(COLORS, SHAPES, PLACES, COLORS)]

CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(use_regex=True):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def normalizers(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex, behavior, invert):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


WORDS = {"type": "Whitespace"}
UNKNOWN = {"unk_token": "[UNK]"}
SUFFIX = {"end_of_word_suffix": "</w>"}
BERT = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
HUGGING_FACE = {
    "words": (None, WORDS, UNKNOWN),
    "words, unknowns fused": (None, WORDS, UNKNOWN | {"fuse_unk": True}),
    "words, unknowns dropped": (None, WORDS, {}),
    "words with suffix": (None, WORDS, UNKNOWN | SUFFIX),
    "minDALL-E": (
        normalizers(BERT | {"lowercase": False}, {"type": "Lowercase"}),
        {"type": "BertPreTokenizer"},
        UNKNOWN | SUFFIX,
    ),
    "GPT-2": (None, byte_level(), {}),
    "CLIP": (
        normalizers({"type": "NFC"}, replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}),
        sequence(split(CLIP_WORDS, "Removed", True), byte_level()),
        UNKNOWN | SUFFIX,
    ),
    "Llama 3": (
        None,
        sequence(split(LLAMA_WORDS, "Isolated", False), byte_level(use_regex=False)),
        {"ignore_merges": True},
    ),
    "Llama 2": (
        normalizers({"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")),
        None,
        UNKNOWN | {"fuse_unk": True, "byte_fallback": True},
    ),
    "Metaspace": (
        None,
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        UNKNOWN,
    ),
}
"""Name -> (normalizer, pre-tokenizer, options of the BPE model)."""


def train_hugging_face(name):
    """(the library's tokenizer, the content of its tokenizer.json) of an entry of HUGGING_FACE."""
    tokenizers = pytest.importorskip("tokenizers")
    normalizer, pre_tokenizer, model = HUGGING_FACE[name]
    options = {name: value for name, value in model.items() if name != "byte_fallback"}
    data = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE(**options)).to_str())
    data |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    special = ["[UNK]"] if "unk_token" in model else []
    if "byte_fallback" in model:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    byte_level = '"ByteLevel"' in json.dumps(pre_tokenizer)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    suffix = {name: value for name, value in model.items() if name == "end_of_word_suffix"}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **suffix
    )
    theirs.train_from_iterator(CAPTIONS, trainer)
    data = json.loads(theirs.to_str())
    data["model"]["byte_fallback"] = model.get("byte_fallback", False)
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(data)), data


def train_youtokentome(folder: Path, **options) -> Path:
    """The model file of youtokentome."""
    youtokentome = pytest.importorskip("youtokentome")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    files = {"data": str(folder / "captions.txt"), "model": str(folder / "bpe.model")}
    youtokentome.BPE.train(**files, vocab_size=200, coverage=0.999, n_threads=1, **options)
    return folder / "bpe.model"
