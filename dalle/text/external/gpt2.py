"""GPT-2's byte-level BPE from its list of merges, as GLIDE reads captions: in lower case."""

import gzip
import zlib
from pathlib import Path

from dalle.io.text import NOT_UTF8, read_text
from dalle.text.external.huggingface import HuggingFaceTokenizer

END = "<|endoftext|>"
MAX_BYTES = 2**24  # of an unpacked list; GPT-2's has 456,318


def load_gpt2_tokenizer(path: Path, lowercase: bool = True) -> HuggingFaceTokenizer:
    """vocab.bpe (merges.txt of Hugging Face) or vocab.bpe.gz: a version, then one merge of two tokens a line.

    Ids are those of encoder.json, which follow from it: the bytes, the merges in order, the end of text.

    Raises:
        ValueError: another file, or a damaged one.
    """
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                text = file.read(MAX_BYTES).decode()
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from None
    else:
        text = read_text(path, "a list of merges")
    merges = [line.split(" ") for line in text.split("\n") if line and not line.startswith("#version")]
    if not merges or NOT_UTF8.search(text) or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path} is no vocab.bpe of GPT-2: expected lines of two tokens")
    tokens = [*byte_symbols(), *("".join(pair) for pair in merges), END]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": len(tokens) - 1, "content": END, "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return HuggingFaceTokenizer(
        {
            "normalizer": {"type": "Lowercase"} if lowercase else None,
            "pre_tokenizer": byte_level,
            "model": model,
            "added_tokens": [end],
        }
    )


def byte_symbols() -> list[str]:
    """The characters that stand for bytes, in the order of their ids: visible ones first, as themselves."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
