"""Learn the text vocabulary from captions (paper section 2.2): the first stage.

python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml
python scripts/train_tokenizer.py --data.path my/images --text.vocab-size 4096
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import cli_errors, parse
from dalle.data import DataConfig, open_dataset
from dalle.io.files import make_directory, write_json
from dalle.io.rng import generator
from dalle.runs.args import ROOT
from dalle.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from dalle.text.coverage import vocabulary_coverage
from dalle.transformer import TransformerConfig
from dalle.types import CaptionedImages

MEASURED = 10_000
"""Images whose captions the report is made from, at most."""


@dataclass(frozen=True)
class TrainTokenizerArgs:
    """Learns the text vocabulary from captions and writes text.json."""

    out: Path | None = None
    """Directory of the run; runs/text unless given."""
    data: DataConfig = DataConfig()
    """Captions to learn from."""
    text: TextTokenizerConfig = TextTokenizerConfig()
    """The vocabulary."""
    captions: int = 100_000
    """Images whose captions are read, at most; of more, so many are drawn, spread over the whole set. It bounds
    the memory: all that is read is held while merges are counted."""
    seed: int = 0
    """Of the draw."""
    model: TransformerConfig = TransformerConfig()
    """The transformer to be; read for its text_len alone, to say how many captions would be cut."""

    def __post_init__(self):
        if self.captions < 1:
            raise ValueError(f"captions must be positive, got {self.captions}")


def train_tokenizer(run: TrainTokenizerArgs) -> TextTokenizer:
    """Reads captions, learns merges, writes <out>/text.json and how well it fits, <out>/report.json."""
    out = make_directory(run.out or ROOT / "text")
    pairs = open_dataset(run.data)
    text = train_text_tokenizer(read_captions(pairs, run.captions, run.seed), run.text)
    room = run.model.layout.max_caption_len
    report = vocabulary_coverage(text, read_captions(pairs, min(run.captions, MEASURED), run.seed), room)
    text.save(out / "text.json")
    write_json(out / "report.json", report)
    _tell(out, report)
    return text


def read_captions(pairs: CaptionedImages, most: int, seed: int) -> Iterator[str]:
    """Every caption of up to `most` images, one image after the other; memory does not grow with them."""
    numbers = draw_numbers(pairs.size, most, seed)
    count = most if pairs.size is None else min(most, pairs.size)
    with tqdm(total=count, desc="captions", unit="image", disable=None) as bar:
        while batch := [number for _, number in zip(range(256), numbers, strict=False)]:
            for captions in pairs.captions(batch):
                yield from captions
            bar.update(len(batch))


def draw_numbers(size: int | None, most: int, seed: int) -> Iterator[int]:
    """Up to `most` numbers below `size`, ascending: one drawn from each of `most` equal stretches.

    All of them where there are no more; the first of an endless set.
    """
    if size is None or size <= most:
        yield from range(most if size is None else size)
        return
    rng = generator("vocabulary", seed)
    for stretch in range(most):
        yield int(rng.integers(stretch * size // most, (stretch + 1) * size // most))


def _tell(out: Path, report: dict[str, Any]) -> None:
    tokens = report["tokens_per_caption"]
    print(
        f"{out / 'text.json'}: {report['vocab_size']} ids; the alphabet covers {report['coverage']:.4%} of letters; "
        f"{tokens['mean']} tokens a caption (median {tokens['median']}, 95 of 100 up to {tokens['95_of_100']}, most "
        f"{tokens['most']}); {report['truncated']:.2%} are longer than {report['room']} and would be cut"
    )


def main() -> None:
    """Command line of train_tokenizer."""
    with cli_errors():
        train_tokenizer(parse(TrainTokenizerArgs, schema=TrainTransformerArgs, description=__doc__))
