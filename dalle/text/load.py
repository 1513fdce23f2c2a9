"""Any text tokenizer this library can hold, from a file or from a checkpoint."""

import json
from pathlib import Path
from typing import Any

from dalle.text.bpe import BPETokenizer
from dalle.text.external import huggingface, youtokentome
from dalle.text.external.huggingface import HuggingFaceTokenizer
from dalle.text.external.youtokentome import YoutokentomeTokenizer, parse_model
from dalle.text.tokenizer import TextTokenizer

KINDS: dict[str, type[BPETokenizer]] = {
    huggingface.FORMAT: HuggingFaceTokenizer,
    youtokentome.FORMAT: YoutokentomeTokenizer,
}


def load_text_tokenizer(path: Path | str) -> BPETokenizer:
    """Reads text_tokenizer.json of this library, a Hugging Face tokenizer.json (BPE), or a model of
    youtokentome.

    Raises:
        ValueError: none of them, or one with a part that cannot be held exactly; says which.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError:
        return TextTokenizer.load(path)  # says what is wrong
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} is not a text tokenizer that can be read: nested too deep") from None
    except ValueError:
        return _youtokentome(path, content)
    try:
        if isinstance(data, dict) and "model" in data and "format" not in data:
            return HuggingFaceTokenizer(data)
        return text_tokenizer_from_dict(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # the others of values of a wrong kind
        said = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
        raise ValueError(
            f"{path} is not a text tokenizer that can be read: {said}. Give a text_tokenizer.json of "
            "scripts/train_tokenizer.py, a Hugging Face tokenizer.json of BPE kind, or a youtokentome model"
        ) from error


def _youtokentome(path: Path, content: bytes) -> BPETokenizer:
    if content[:1].isdigit():
        try:
            return YoutokentomeTokenizer(parse_model(content.decode()))
        except ValueError as error:
            raise ValueError(f"{path} is not a text tokenizer that can be read: {error}") from error
    return TextTokenizer.load(path)


def text_tokenizer_from_dict(data: dict[str, Any]) -> BPETokenizer:
    """The inverse of a tokenizer's `to_dict`, whichever it is."""
    kind = KINDS.get(data.get("format"), TextTokenizer) if isinstance(data, dict) else TextTokenizer
    return kind.from_dict(data)
