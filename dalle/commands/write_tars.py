"""WebDataset tars of captioned images in any format; large datasets read best from them.

python scripts/write_tars.py --path my/images --out my/tars
python scripts/write_tars.py --path coco.jsonl --out coco-tars --shard-size 5000
"""

from dataclasses import dataclass
from pathlib import Path

from dalle.config import cli_errors, parse
from dalle.data.config import Format


@dataclass(frozen=True)
class WriteTarsArgs:
    """Packs captioned images in any format into tars that `--data.path` opens."""

    path: str | None = None
    """Captioned images, as for `--data.path`."""
    out: Path | None = None
    """Folder of the tars; must not hold any yet."""
    shard_size: int = 10_000
    """Samples per tar."""
    format: Format = "auto"
    """folder, table, tars or hub, if the path does not determine it."""
    image_column: str | None = None
    """Column of a table with the images; default: the first of the usual names."""
    caption_column: str | None = None
    """Column of a table, or key in JSON, with the captions; default: the first of the usual names."""
    image_root: str | None = None
    """Folder that a table's relative paths start from; default: the table's own."""


def run_write_tars(args: WriteTarsArgs) -> None:
    """Writes the tars and prints the samples that were left out."""
    from tqdm import tqdm

    from dalle.data.sources import open_source
    from dalle.data.webdataset_writer import write_tars
    from dalle.io.files import make_directory

    for name in ("path", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; for example --path my/table.csv --out my/tars")
    source = open_source(
        args.path, args.format, args.image_column, args.caption_column, image_root=args.image_root
    )
    make_directory(args.out)
    with tqdm(total=len(source), desc="tars", unit="image", disable=None) as bar:
        done = write_tars(source, args.out, args.shard_size, bar.update)
    print(f"{args.out}: {done.images} images in {done.tars} tars; {len(done.left_out)} left out")
    for text in done.left_out[:5]:
        print(f"  {text}")


def main() -> None:
    """Command line of write_tars."""
    with cli_errors():
        run_write_tars(parse(WriteTarsArgs, description=__doc__))
