"""Pack images and captions of any form into WebDataset tars, which large sets read best from.

python scripts/write_tars.py --path my/images --out my/tars
python scripts/write_tars.py --path coco.jsonl --out coco-tars --shard-size 5000
"""

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dalle.config import cli_errors, parse
from dalle.data.config import Format
from dalle.data.sources import open_source
from dalle.data.webdataset_writer import Packed, write_tars
from dalle.io.files import make_directory


@dataclass(frozen=True)
class WriteTarsArgs:
    """Writes images and captions of any form into tars that `--data.path` opens."""

    path: str | None = None
    """What to pack, as `--data.path` takes it."""
    out: Path | None = None
    """Folder of the tars; must hold none yet."""
    shard_size: int = 10_000
    """Samples a tar."""
    kind: Format = "auto"
    """folder, table, tars or hub, where the path does not tell."""
    image_column: str | None = None
    """Column of a table with the images; found among the usual names unless given."""
    caption_column: str | None = None
    """Column of a table, or key in JSON, with the captions; found among the usual names unless given."""
    images: str | None = None
    """Folder that a table's relative paths start from; the table's own unless given."""


def pack(run: WriteTarsArgs) -> Packed:
    """Writes the tars and says what was left out."""
    for name in ("path", "out"):
        if getattr(run, name) is None:
            raise ValueError(f"--{name} is missing; for example --path my/table.csv --out my/tars")
    source = open_source(run.path, run.kind, run.image_column, run.caption_column, images=run.images)
    make_directory(run.out)
    with tqdm(total=len(source), desc="tars", unit="image", disable=None) as bar:
        done = write_tars(source, run.out, run.shard_size, bar.update)
    print(f"{run.out}: {done.images} images in {done.tars} tars; {len(done.left_out)} left out")
    for text in done.left_out[:5]:
        print(f"  {text}")
    return done


def main() -> None:
    """Command line of write_tars."""
    with cli_errors():
        pack(parse(WriteTarsArgs, description=__doc__))
