"""Train the text tokenizer on captions (Section 2.2): the first stage.

python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml
python scripts/train_tokenizer.py --data.path my/images --text.vocab-size 4096
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import cli_errors, configuration, parse
from dalle.data import DataConfig
from dalle.runs import ROOT
from dalle.text import TextTokenizer, TextTokenizerConfig
from dalle.transformer import TransformerConfig
from dalle.types import CaptionedImages

MEASURED = 10_000
"""Images whose captions the report measures, at most."""


@configuration
class TrainTokenizerArgs:
    """Trains the text tokenizer on captions and writes text_tokenizer.json."""

    out: Path | None = None
    """Directory of the run; runs/text unless given."""
    data: DataConfig = DataConfig()
    """Captions to train on."""
    text: TextTokenizerConfig = TextTokenizerConfig()
    """The vocabulary."""
    captions: int = 100_000
    """Images whose captions are read, at most: a random sample of a larger dataset. All of them are held
    in memory while merges are counted."""
    seed: int = 0
    """Of the random sample."""
    model: TransformerConfig = TransformerConfig()
    """The transformer to be; only its text_len is read, to report how many captions would be truncated."""

    def __post_init__(self):
        if self.captions < 1:
            raise ValueError(f"captions must be positive, got {self.captions}")


def train_tokenizer(args: TrainTokenizerArgs) -> TextTokenizer:
    """Writes <out>/text_tokenizer.json and its statistics, <out>/report.json."""
    from dalle.data import open_dataset
    from dalle.io.files import check_result, make_directory, write_json
    from dalle.text import train_text_tokenizer
    from dalle.text.coverage import vocabulary_coverage

    out = make_directory(check_result(args.out or ROOT / "text"))
    dataset = open_dataset(args.data)
    text = train_text_tokenizer(read_captions(dataset, args.captions, args.seed), args.text)
    max_len = args.model.layout.max_caption_len
    captions = read_captions(dataset, min(args.captions, MEASURED), args.seed)
    report = vocabulary_coverage(text, captions, max_len)
    text.save(out / "text_tokenizer.json")
    write_json(out / "report.json", report)
    tokens = report["tokens_per_caption"]
    print(
        f"{out / 'text_tokenizer.json'}: {report['vocab_size']} ids; the alphabet covers "
        f"{report['coverage']:.4%} of letters; {tokens['mean']} tokens a caption (median {tokens['median']}, "
        f"95 of 100 up to {tokens['95_of_100']}, most {tokens['most']}); "
        f"{report['truncated']:.2%} are longer than {max_len} and would be truncated"
    )
    return text


def read_captions(dataset: CaptionedImages, most: int, seed: int) -> Iterator[str]:
    """Every caption of up to `most` images, 256 images in memory at a time."""
    indices = sample_indices(dataset.size, most, seed)
    with tqdm(total=min(most, dataset.size or most), desc="captions", unit="image", disable=None) as bar:
        while batch := list(islice(indices, 256)):
            for captions in dataset.captions(batch):
                yield from captions
            bar.update(len(batch))


def sample_indices(size: int | None, most: int, seed: int) -> Iterator[int]:
    """Up to `most` ascending indices below `size`, one random index from each of `most` equal stretches.

    An endless dataset (size None) gives its first `most`.
    """
    from dalle.sampling import generator

    size = size or most
    most = min(most, size)
    rng = generator("vocabulary", seed)
    for stretch in range(most):
        yield int(rng.integers(stretch * size // most, (stretch + 1) * size // most))


def main() -> None:
    """Command line of train_tokenizer."""
    with cli_errors():
        train_tokenizer(parse(TrainTokenizerArgs, schema=TrainTransformerArgs, description=__doc__))
