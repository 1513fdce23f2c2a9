"""A Hugging Face tokenizer.json of BPE kind: byte-level (GPT-2, CLIP, Llama 3), of words, or with word marks.

The `tokenizers` package normalizes a caption and splits it into pieces; merges are ours, for a seeded
dropout. Ids equal those of `tokenizers.Tokenizer.encode(caption, add_special_tokens=False)`, except that a
special token spelled out in a caption ("<|endoftext|>") is text. Start, end, padding and truncation belong to
the layout of the sequence and are ignored here.
"""

import json
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from dalle.text.bpe import UNKNOWN_TEXT, BPETokenizer, Merges

FORMAT, VERSION = "huggingface-bpe", 1
KEPT = ("normalizer", "pre_tokenizer", "model", "added_tokens")
WORD_MARK = "\u2581"
BYTE_LEVEL_SPACE = "\u0120"


class HuggingFaceTokenizer(BPETokenizer):
    """Byte-pair encoding described by the content of a tokenizer.json, or by what `to_dict` returns."""

    def __init__(self, data: dict[str, Any]):
        self.data = {name: data.get(name) for name in KEPT}
        model, added = self.data["model"], self.data["added_tokens"] or []
        _check(model, added)
        super().__init__(_merges(model))
        self._vocab: dict[str, int] = model["vocab"]
        self._texts = {token: text for text, token in self._vocab.items()}
        self._texts |= {token["id"]: "" for token in added}
        self.vocab_size = max(self._texts) + 1
        self.unknown_id = self._vocab[model["unk_token"]] if model.get("unk_token") else None
        if self.unknown_id is not None:
            self._texts[self.unknown_id] = UNKNOWN_TEXT
        self._suffix = model.get("end_of_word_suffix") or ""
        tokenizers = import_tokenizers()
        parts = _normalizer_and_pre_tokenizer(tokenizers, self.data)
        self._normalizer, self._pre_tokenizer = parts.normalizer, parts.pre_tokenizer
        self._byte_level = '"ByteLevel"' in json.dumps(self.data["pre_tokenizer"])
        self._marked = any(WORD_MARK in text for text in self._vocab)
        decoders = tokenizers.decoders
        self._decoder = decoders.ByteLevel() if self._byte_level else decoders.ByteFallback()

    def pieces(self, caption: str) -> list[str]:
        """The normalized caption, split by the pre-tokenizer."""
        text = self._normalizer.normalize_str(caption) if self._normalizer else caption
        if self._pre_tokenizer is None:
            return [text] if text else []
        return [piece for piece, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    def symbols(self, piece: str) -> list[int]:
        """A piece's characters; bytes or unknown for those outside the vocabulary."""
        model = self.data["model"]
        if model.get("ignore_merges") and piece in self._vocab:
            return [self._vocab[piece]]
        symbols: list[int] = []
        unknowns = 0  # appended before the next known character
        for at, character in enumerate(piece, start=1):
            text = character + self._suffix if at == len(piece) else character
            in_bytes = [self._vocab.get(f"<0x{byte:02X}>") for byte in text.encode()]
            if text in self._vocab:
                symbols += [self.unknown_id] * unknowns + [self._vocab[text]]
                unknowns = 0
            elif model.get("byte_fallback") and None not in in_bytes:
                symbols += in_bytes
            elif self.unknown_id is not None:
                unknowns = 1 if model.get("fuse_unk") else unknowns + 1
        return symbols + [self.unknown_id] * unknowns

    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        texts = [self._text(self.check_token(at, token)) for at, token in enumerate(ids)]
        return self._decoder.decode(texts).strip()

    def _text(self, token: int) -> str:
        """Text of a token, with a space where a word begins or ends."""
        text = self._texts.get(token, "")
        if self._suffix:
            return text.replace(self._suffix, BYTE_LEVEL_SPACE if self._byte_level else " ")
        if self._byte_level or not text:
            return text
        return text.replace(WORD_MARK, " ") if self._marked else f"{text} "

    def to_dict(self) -> dict[str, Any]:
        """The parts of tokenizer.json that ids depend on."""
        return {"format": FORMAT, "version": VERSION, **self.data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "HuggingFaceTokenizer":
        """The inverse of to_dict; ValueError for other data."""
        if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected the format {FORMAT!r} in version {VERSION}")
        return cls(data)


def import_tokenizers() -> ModuleType:
    """The optional package."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("a Hugging Face tokenizer needs the package: pip install tokenizers") from error
    return tokenizers


def _normalizer_and_pre_tokenizer(tokenizers: ModuleType, data: dict[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` with these two parts alone."""
    parts = {name: data[name] for name in ("normalizer", "pre_tokenizer")}
    if '"Precompiled"' in json.dumps(parts):  # of SentencePiece; tokenizers panics if it is damaged
        raise ValueError("tokenizer.json has the normalizer 'Precompiled', which is not supported")
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(empty | parts))
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"tokenizers cannot read its normalizer or pre_tokenizer: {error}") from None


def _check(model: Any, added: list[dict[str, Any]]) -> None:
    """ValueError for what the ids of this library would not be equal for."""
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ValueError(f"tokenizer.json has a model of type {kind!r}; only BPE is supported")
    ids = [*(model["vocab"] or {}).values(), *(token["id"] for token in added)]
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise ValueError("tokenizer.json has tokens that are not numbered from 0")
    if not isinstance(model.get("end_of_word_suffix") or "", str):
        raise ValueError("tokenizer.json has an end_of_word_suffix that is no text")
    for name in ("continuing_subword_prefix", "dropout"):
        if model.get(name):
            raise ValueError(f"tokenizer.json sets {name} to {model[name]!r}, which is not supported")
    if words := [token["content"] for token in added if not token.get("special")]:
        raise ValueError(f"tokenizer.json adds the words {words[:5]!r} outside BPE, which is not supported")


def _merges(model: dict[str, Any]) -> Merges:
    vocab, merges = model["vocab"], {}
    for rank, pair in enumerate(model["merges"]):
        pair = pair.split(" ") if isinstance(pair, str) else pair
        if len(pair) != 2:
            hint = "it has a space in a token: save the file again by tokenizers 0.20 or newer"
            raise ValueError(f"merge {rank} of tokenizer.json, {pair!r:.100}, is not of two tokens; {hint}")
        left, right = pair
        for part in (left, right, left + right):
            if part not in vocab:
                raise ValueError(f"merge {rank}, {pair!r}, needs {part!r}, which its vocabulary lacks")
        merges[vocab[left], vocab[right]] = rank, vocab[left + right]
    return merges
