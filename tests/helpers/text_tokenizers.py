"""Text tokenizers that Hugging Face's tokenizers and youtokentome train."""

import json
from itertools import product
from pathlib import Path

import youtokentome
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import NFC, BertNormalizer, Lowercase, Prepend, Replace
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace, Split, Whitespace

COLORS, SHAPES = ["red", "green", "blue", "yellow"], ["circle", "square", "photograph"]
PLACES = ["under a dog's bowl", "(seen from above)", "in 1984, of 3.5 m"]
PLACES += [" красная", "红色的圆 在左边", "كرة حمراء"]
CAPTIONS = [f"A {c} {s} {p}, the {c2}-{s}!" for c, s, p, c2 in product(COLORS, SHAPES, PLACES, COLORS)]

CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


UNKNOWN = {"unk_token": "[UNK]"}
SUFFIX = {"end_of_word_suffix": "</w>"}
HUGGING_FACE = {
    "words": (None, Whitespace(), UNKNOWN),
    "words, unknowns fused": (None, Whitespace(), UNKNOWN | {"fuse_unk": True}),
    "words, unknowns dropped": (None, Whitespace(), {}),
    "words with suffix": (None, Whitespace(), UNKNOWN | SUFFIX),
    "minDALL-E": (
        normalizers.Sequence([BertNormalizer(lowercase=False), Lowercase()]),
        BertPreTokenizer(),
        UNKNOWN | SUFFIX,
    ),
    "GPT-2": (None, ByteLevel(add_prefix_space=False), {}),
    "CLIP": (
        normalizers.Sequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()]),
        pre_tokenizers.Sequence(
            [Split(Regex(CLIP_WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False)]
        ),
        UNKNOWN | SUFFIX,
    ),
    "Llama 3": (
        None,
        pre_tokenizers.Sequence(
            [Split(Regex(LLAMA_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        {"ignore_merges": True},
    ),
    "Llama 2": (
        normalizers.Sequence([Prepend("\u2581"), Replace(" ", "\u2581")]),
        None,
        UNKNOWN | {"fuse_unk": True, "byte_fallback": True},
    ),
    "Metaspace": (None, Metaspace(prepend_scheme="always"), UNKNOWN),
}
"""Name -> (normalizer, pre-tokenizer, options of the BPE model)."""


def train_hugging_face(name):
    """(the library's tokenizer, the content of its tokenizer.json) of an entry of HUGGING_FACE."""
    normalizer, pre_tokenizer, model = HUGGING_FACE[name]
    theirs = Tokenizer(models.BPE(**model))
    for part, value in (("normalizer", normalizer), ("pre_tokenizer", pre_tokenizer)):
        if value is not None:
            setattr(theirs, part, value)
    special = ["[UNK]"] if "unk_token" in model else []
    if "byte_fallback" in model:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    byte_level = "ByteLevel" in theirs.to_str()
    suffix = {name: value for name, value in model.items() if name == "end_of_word_suffix"}
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
        **suffix,
    )
    theirs.train_from_iterator(CAPTIONS, trainer)
    data = json.loads(theirs.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data)), data


def train_youtokentome(folder: Path, **options) -> Path:
    """The model file of youtokentome."""
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    files = {"data": str(folder / "captions.txt"), "model": str(folder / "bpe.model")}
    youtokentome.BPE.train(**files, vocab_size=200, coverage=0.999, n_threads=1, **options)
    return folder / "bpe.model"
