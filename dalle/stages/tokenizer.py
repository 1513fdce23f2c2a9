"""Text vocabulary: byte-pair merges learnt from captions (paper section 2.2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dalle.data import PairsConfig, open_pairs
from dalle.stages.runs import ROOT
from dalle.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from dalle.train.state import make_directory
from dalle.types import Pairs


@dataclass(frozen=True)
class TokenizerRun:
    """Learns the text vocabulary from captions and writes text.json."""

    out: Path | None = None
    """Directory of the run; runs/text unless given."""
    data: PairsConfig = PairsConfig()
    """Captions to learn from."""
    text: TextTokenizerConfig = TextTokenizerConfig()
    """The vocabulary."""
    captions: int = 100_000
    """Pictures whose captions are read, at most."""

    def __post_init__(self):
        if self.captions < 1:
            raise ValueError(f"captions must be positive, got {self.captions}")


def train_tokenizer(run: TokenizerRun) -> TextTokenizer:
    """Reads captions, learns merges, writes <out>/text.json."""
    out = make_directory(run.out or ROOT / "text")
    pairs = open_pairs(run.data)
    text = train_text_tokenizer(_captions(pairs, run.captions), run.text)
    text.save(out / "text.json")
    shown = next(_captions(pairs, 1))
    print(f"{out / 'text.json'}: {text.vocab_size} ids; {shown!r} has {len(text.encode(shown))} tokens")
    return text


def _captions(pairs: Pairs, most: int) -> Iterator[str]:
    """Captions of up to `most` pictures."""
    count = most if pairs.size is None else min(most, pairs.size)
    for start in tqdm(range(0, count, 256), desc="captions", unit="x256", disable=None):
        for captions in pairs.captions(range(start, min(start + 256, count))):
            yield from captions
