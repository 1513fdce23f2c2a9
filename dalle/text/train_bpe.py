"""Training of byte-pair merges (Section 2.2) by youtokentome, which nothing else needs."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dalle.text.external.youtokentome import parse_model
from dalle.text.tokenizer import UNKNOWN_ID, TextTokenizer, TextTokenizerConfig, normalize


def train_text_tokenizer(captions: Iterable[str], config: TextTokenizerConfig | None = None) -> TextTokenizer:
    """Learns an alphabet and merges from captions.

    Not reproducible: among equally frequent pairs youtokentome takes whichever its threads find first, even
    with n_threads=1. The vocabulary is smaller than config.vocab_size if the captions have no more pairs to
    merge.

    Raises:
        ImportError: youtokentome is not installed.
        ValueError: nothing to learn from, or vocab_size is too small for the bytes and the alphabet.
    """
    try:
        import youtokentome
    except ImportError as error:
        raise ImportError(
            "training a text tokenizer needs youtokentome: "
            "pip install cython setuptools wheel && pip install --no-build-isolation youtokentome"
        ) from error
    if isinstance(captions, str):
        raise TypeError("captions must be an iterable of str, not one str: put it in a list")
    config = config or TextTokenizerConfig()
    offset = 256 if config.byte_fallback else 0  # youtokentome has no ids of bytes
    with tempfile.TemporaryDirectory() as folder:
        text, model_file = Path(folder, "captions.txt"), Path(folder, "bpe.model")
        n_pieces = 0
        with text.open("w", encoding="utf-8", newline="\n") as file:
            for caption in captions:
                pieces = normalize(caption)
                n_pieces += len(pieces)
                file.write(" ".join(pieces) + "\n")  # youtokentome does not merge across spaces
        if n_pieces == 0:
            raise ValueError("there is nothing to train on: give at least one caption with a word in it")
        try:
            with _no_stderr():
                youtokentome.BPE.train(
                    data=str(text),
                    model=str(model_file),
                    vocab_size=max(config.vocab_size - offset, 1),
                    coverage=config.character_coverage,
                    n_threads=1,
                    unk_id=UNKNOWN_ID,
                    pad_id=-1,  # -1: no such id
                    bos_id=-1,
                    eos_id=-1,
                )
        except ValueError as error:
            needed = re.search(r"vocab_size>=(\d+)", str(error))
            if needed is None:
                raise
            raise ValueError(
                f"vocab_size {config.vocab_size} is too small: these captions need at least "
                f"{offset + int(needed[1])} ids for unknown, bytes and alphabet, and more for merges"
            ) from error
        model = parse_model(model_file.read_text(encoding="utf-8"))
    ids = [token for token, _ in model["characters"]] + [merged for *_, merged in model["merges"]]
    assert ids == list(range(UNKNOWN_ID + 1, UNKNOWN_ID + 1 + len(ids))), "expected ids without gaps"
    characters = "".join(character for _, character in model["characters"])
    merges = [(left + offset, right + offset) for left, right, _ in model["merges"]]
    return TextTokenizer(config, characters, merges)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Discards what youtokentome prints to file descriptor 2; it raises its errors."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
