"""Opening a model directory as the pipeline that it is of."""

from pathlib import Path

import torch

from dalle.hub.hub import resolve_source
from dalle.io.files import read_config
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.glide import GLIDE
from dalle.pretrained.glide import is_glide_folder
from dalle.train.precision import Precision


def open_pipeline(
    source: Path | str,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    int8: bool = False,
    inpainting: bool = False,
) -> DALLE | GLIDE:
    """A `DALLE` or `GLIDE` by the parts of a model directory; arguments as their `from_pretrained`."""
    folder = Path(source)
    published = is_glide_folder(folder)
    directory = folder if folder.is_dir() else resolve_source(source, ())
    if published or "base" in read_config(directory)["parts"]:
        return GLIDE.from_pretrained(source, device, inpainting=inpainting).to_precision(precision, int8)
    return DALLE.from_pretrained(source, device, precision, int8=int8)
