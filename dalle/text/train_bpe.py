"""Training the byte-pair encoding (section 2.2): youtokentome finds the merges, we keep them.

Nothing else needs youtokentome: its model file is plain text and is read here once.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dalle.text.external.youtokentome import parse_model
from dalle.text.tokenizer import UNKNOWN_ID, TextTokenizer, TextTokenizerConfig, normalize


def train_text_tokenizer(captions: Iterable[str], config: TextTokenizerConfig | None = None) -> TextTokenizer:
    """Learn an alphabet and merges from captions.

    Keep the result, for training again may differ: among pairs that are equally frequent youtokentome takes
    whichever its threads find first, even with n_threads=1. The vocabulary is smaller than config.vocab_size
    if the captions have no more pairs to merge. ValueError if there is nothing to learn from or the
    vocabulary cannot hold the bytes and the alphabet.
    """
    youtokentome = _import_youtokentome()
    config = config or TextTokenizerConfig()
    with tempfile.TemporaryDirectory() as folder:
        text, model = Path(folder, "captions.txt"), Path(folder, "bpe.model")
        _write_pieces(captions, text)
        _run_youtokentome(youtokentome, text, model, config)
        return _read_youtokentome(model, config)


def _import_youtokentome() -> ModuleType:
    try:
        import youtokentome
    except ImportError as error:
        raise ImportError(
            "training a text tokenizer needs youtokentome: "
            "pip install cython setuptools wheel && pip install --no-build-isolation youtokentome"
        ) from error
    return youtokentome


def _write_pieces(captions: Iterable[str], path: Path) -> None:
    """One caption a line, a space between pieces: youtokentome does not merge across spaces."""
    if isinstance(captions, str):
        raise TypeError("captions must be an iterable of str, not one str: put it in a list")
    n_pieces = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for caption in captions:
            pieces = normalize(caption)
            n_pieces += len(pieces)
            file.write(" ".join(pieces) + "\n")
    if n_pieces == 0:
        raise ValueError("there is nothing to train on: give at least one caption with a word in it")


def _run_youtokentome(youtokentome: ModuleType, text: Path, model: Path, config: TextTokenizerConfig) -> None:
    """Write the model file of the largest vocabulary that fits; with too few pairs it is smaller."""
    reserved = _offset(config)
    try:
        with _quiet():
            youtokentome.BPE.train(
                data=str(text),
                model=str(model),
                vocab_size=max(config.vocab_size - reserved, 1),
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
            f"{reserved + int(needed[1])} ids for unknown, bytes and alphabet, and more for merges"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing reaches the process's stderr: youtokentome tells its settings there, past Python; errors it
    raises."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _read_youtokentome(path: Path, config: TextTokenizerConfig) -> TextTokenizer:
    model = parse_model(path.read_text(encoding="utf-8"))
    ids = [token for token, _ in model["characters"]] + [merged for *_, merged in model["merges"]]
    assert ids == list(range(UNKNOWN_ID + 1, UNKNOWN_ID + 1 + len(ids))), (
        "characters, then merges, without gaps"
    )
    offset = _offset(config)
    characters = "".join(character for _, character in model["characters"])
    return TextTokenizer(
        config, characters, [(left + offset, right + offset) for left, right, _ in model["merges"]]
    )


def _offset(config: TextTokenizerConfig) -> int:
    """Our id less youtokentome's, for all but unknown: it knows no bytes."""
    return config.first_character_id - (UNKNOWN_ID + 1)
