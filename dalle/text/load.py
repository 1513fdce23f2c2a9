"""Loading of text tokenizers, of this library or another."""

import json
from pathlib import Path
from typing import Any

from dalle.text.bpe import BPETokenizer
from dalle.text.external import huggingface, youtokentome
from dalle.text.tokenizer import TextTokenizer

FORMATS: dict[str, type[BPETokenizer]] = {
    huggingface.FORMAT: huggingface.HuggingFaceTokenizer,
    youtokentome.FORMAT: youtokentome.YoutokentomeTokenizer,
}


def load_text_tokenizer(path: Path | str) -> BPETokenizer:
    """Reads text_tokenizer.json of this library, a Hugging Face tokenizer.json, or a youtokentome model.

    Raises:
        ValueError: another file, or a damaged or unsupported one.
    """
    expected = (
        "expected text_tokenizer.json of scripts/train_tokenizer.py, a Hugging Face tokenizer.json of BPE "
        "kind, or a youtokentome model"
    )
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}); {expected}") from error
    try:
        if content[:1].isdigit():
            return youtokentome.YoutokentomeTokenizer(youtokentome.parse_model(content.decode()))
        data = json.loads(content)
        if isinstance(data, dict) and "model" in data and "format" not in data:
            return huggingface.HuggingFaceTokenizer(data)
        return text_tokenizer_from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
        raise ValueError(f"{path} is not a text tokenizer: {reason}; {expected}") from error


def text_tokenizer_from_dict(data: dict[str, Any]) -> BPETokenizer:
    """The inverse of `BPETokenizer.to_dict`, whatever its class."""
    name = data.get("format") if isinstance(data, dict) else None
    return FORMATS.get(name, TextTokenizer).from_dict(data)
