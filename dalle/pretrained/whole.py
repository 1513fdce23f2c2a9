"""A transformer of others, joined with the image tokenizer and the text tokenizer that it was trained with."""

from pathlib import Path

import torch

from dalle.pipeline import DALLE
from dalle.pretrained.load import load_image_tokenizer, load_transformer
from dalle.text import MergeTokenizer
from dalle.types import ImageTokenizer, Scorer


def load_whole(
    path: Path | str,
    text: MergeTokenizer,
    dvae: ImageTokenizer | None = None,
    scorer: Scorer | None = None,
    device: str | torch.device = "cpu",
) -> DALLE:
    """A `DALLE` from a published transformer.

    Args:
        path: the file, for example DALLE-pytorch's dalle.pt.
        text: the text tokenizer of its training; no file holds it (`dalle.text.load_text` reads many).
        dvae: the image tokenizer of its training; unless given, the one that lies in the file.
        scorer: ranks pictures.

    Raises:
        ValueError: no such transformer, or parts that do not belong together.
    """
    dvae = load_image_tokenizer(path, device) if dvae is None else dvae
    return DALLE(dvae, load_transformer(path, device), text, scorer)
