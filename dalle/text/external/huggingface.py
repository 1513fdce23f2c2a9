"""A Hugging Face tokenizer.json of BPE kind, held as it is: byte-level (GPT-2, CLIP, Llama 3), by words, or
with word marks and bytes (Llama 2).

Ids equal those of `tokenizers.Tokenizer.encode(caption, add_special_tokens=False)`, with one difference on
purpose: a special token spelt out in a caption ("<|endoftext|>") is text, not the token. Begin, end, padding
and truncation belong to the layout of the sequence and are left aside. Whatever else cannot be held is
refused by name. Letters that the latest versions of Unicode added may fall otherwise, for every library
carries its own tables.
"""

from collections.abc import Iterable
from typing import Any

from dalle.text.bpe import BPETokenizer, Merges
from dalle.text.external.pre_tokenizers import MARK, byte_letters, normalizer, splitter
from dalle.text.tokenizer import UNKNOWN_TEXT

FORMAT, VERSION = "huggingface-bpe", 1
HELD = ("normalizer", "pre_tokenizer", "model", "added_tokens")


class HuggingFaceTokenizer(BPETokenizer):
    """Byte-pair encoding as a tokenizer.json describes it.

    Args:
        data: the file's content, or what `to_dict` gave.
    """

    def __init__(self, data: dict[str, Any]):
        self.data = {name: data.get(name) for name in HELD}
        model = self.data["model"]
        _check(model, self.data["added_tokens"] or [])
        self._vocab: dict[str, int] = model["vocab"]
        self._suffix = model.get("end_of_word_suffix") or ""
        super().__init__(_merges(model))
        self._normalize = normalizer(self.data["normalizer"])
        self._split = splitter(self.data["pre_tokenizer"])
        special = {token["id"]: "" for token in self.data["added_tokens"] or []}
        self._spelling = {token: text for text, token in self._vocab.items()} | special
        self.vocab_size = max(self._spelling) + 1
        self._unknown = self._vocab[model["unk_token"]] if model.get("unk_token") else None
        self._byte_level = _uses(self.data["pre_tokenizer"], "ByteLevel")
        self._marked = any(MARK in text for text in self._vocab)

    def pieces(self, caption: str) -> list[str]:
        """Normalized, then cut by the pre-tokenizer."""
        text = self._normalize(caption)
        return self._split([text]) if text else []

    def symbols(self, piece: str) -> list[int]:
        """A piece's letters; bytes or unknown for those that the vocabulary lacks."""
        model = self.data["model"]
        if model.get("ignore_merges") and piece in self._vocab:
            return [self._vocab[piece]]
        symbols: list[int] = []
        unknowns = 0  # written when the next known letter comes
        for at, letter in enumerate(piece, start=1):
            text = letter + self._suffix if at == len(piece) else letter
            if text in self._vocab:
                symbols += [self._unknown] * unknowns + [self._vocab[text]]
                unknowns = 0
            elif model.get("byte_fallback") and (spelt := self._bytes(text)):
                symbols += spelt
            elif self._unknown is not None:
                unknowns = 1 if model.get("fuse_unk") else unknowns + 1
        return symbols + [self._unknown] * unknowns

    def _bytes(self, text: str) -> list[int] | None:
        """<0x0A> for each byte, if the vocabulary has them all."""
        tokens = [self._vocab.get(f"<0x{byte:02X}>") for byte in text.encode()]
        return None if None in tokens else tokens

    def decode(self, ids: Iterable[int]) -> str:
        """A readable caption; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        texts = [self._text(self.check_token(at, token)) for at, token in enumerate(ids)]
        if self._byte_level:
            numbers = {letter: byte for byte, letter in enumerate(byte_letters())}
            spelling = b"".join(
                bytes([numbers[letter]]) if letter in numbers else letter.encode()
                for text in texts
                for letter in text
            )
            return spelling.decode("utf-8", errors="replace").strip()
        spelling = b"".join(map(_plain_bytes, texts))
        return spelling.decode("utf-8", errors="replace").strip()

    def _text(self, token: int) -> str:
        """How a token is written, with a space where a word begins or ends."""
        text = UNKNOWN_TEXT if token == self._unknown else self._spelling.get(token, "")
        if self._suffix:
            return text.removesuffix(self._suffix) + " " * text.endswith(self._suffix)
        if self._byte_level:
            return text
        return text.replace(MARK, " ") if self._marked else text + " " * bool(text)

    def to_dict(self) -> dict[str, Any]:
        """What ids depend on, in types that JSON knows."""
        return {"format": FORMAT, "version": VERSION, **self.data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "HuggingFaceTokenizer":
        """The inverse of to_dict; ValueError if data is anything else."""
        if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"expected the format {FORMAT!r} in version {VERSION}")
        return cls(data)


def _plain_bytes(text: str) -> bytes:
    """The byte of "<0x0A>", else the text as UTF-8."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes.fromhex(text[3:5])
    return text.encode()


def _check(model: Any, added: list[dict[str, Any]]) -> None:
    """ValueError, by name, for what cannot be held exactly."""
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    if kind != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ValueError(f"tokenizer.json has a model of type {kind!r}; only BPE is read here")
    ids = [*(model["vocab"] or {}).values(), *(token["id"] for token in added)]
    if not ids or any(type(token) is not int or token < 0 for token in ids):
        raise ValueError("tokenizer.json has tokens that are not numbered from 0")
    if not isinstance(model.get("end_of_word_suffix") or "", str):
        raise ValueError("tokenizer.json has an end_of_word_suffix that is no text")
    for name in ("continuing_subword_prefix", "dropout"):
        if model.get(name):
            raise ValueError(
                f"tokenizer.json sets the model's {name} to {model[name]!r}, which this library does not hold"
            )
    words = [token["content"] for token in added if not token.get("special")]
    if words:
        raise ValueError(
            f"tokenizer.json adds the words {words[:5]!r} outside BPE, which this library does not hold"
        )


def _merges(model: dict[str, Any]) -> Merges:
    vocab, merges = model["vocab"], {}
    for rank, pair in enumerate(model["merges"]):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        try:
            parts = vocab[left], vocab[right]  # before the whole, which lacks what a part lacks
            merges[parts] = rank, vocab[left + right]
        except KeyError as error:
            raise ValueError(
                f"merge {rank} of tokenizer.json, {pair!r}, needs {error}, which its vocabulary lacks"
            ) from None
    return merges


def _uses(pre_tokenizer: dict[str, Any] | None, kind: str) -> bool:
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    return any(part.get("type") == kind for part in parts)
