"""Image tokens of a trained dVAE (paper section 2.2): the token cache for stage two.

python scripts/encode_images.py --config configs/dvae/shapes.yaml
python scripts/encode_images.py --config configs/dvae/small.yaml --data.path my/images --dvae runs/dvae
torchrun --nproc-per-node 8 scripts/encode_images.py ...            eight processes share the work; so does
python scripts/encode_images.py ... --encode.part 0 --encode.parts 8     each of eight such commands
"""

from pathlib import Path
from typing import TYPE_CHECKING

from dalle.commands.train_dvae import EncodeConfig, TrainDVAEArgs
from dalle.config import cli_errors, configuration, parse
from dalle.data.config import DataConfig

if TYPE_CHECKING:
    from dalle.data import TokenCache


@configuration
class EncodeImagesArgs:
    """Encodes images with a trained dVAE into a token cache for the transformer."""

    out: Path | None = None
    """Directory of the cache; default: runs/tokens. An interrupted encoding in it resumes."""
    dvae: Path | None = None
    """Run, checkpoint or model directory of the dVAE; default: the newest under runs/. Also a published image
    tokenizer: the folder of OpenAI's encoder.pkl and decoder.pkl, or a file that dalle/pretrained/load.py
    reads."""
    seed: int = 0
    """Seed of the random crops."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is available."""
    data: DataConfig = DataConfig()
    """Images and captions."""
    encode: EncodeConfig = EncodeConfig()
    """Number of images and crops, and the part of this process."""


def encode_images(args: EncodeImagesArgs) -> "TokenCache | None":
    """Encodes the shards of this process; returns the cache, or None while other parts have shards to do."""
    from dalle.runs.encoding import encode

    return encode(args)


def main() -> None:
    """Command line of encode_images."""
    with cli_errors(parallel=True):
        encode_images(parse(EncodeImagesArgs, schema=TrainDVAEArgs, description=__doc__))
