"""A transformer of others, joined with the image tokenizer and the text tokenizer that it was trained with."""

from pathlib import Path

import torch

from dalle.pipelines.dalle import DALLE
from dalle.pretrained.archive import is_archive
from dalle.pretrained.load import at_hand, load_image_tokenizer, load_transformer
from dalle.pretrained.mindalle import reader as mindalle
from dalle.pretrained.rudalle.model import Rudalle
from dalle.pretrained.rudalle.reader import lowercase
from dalle.text import BPETokenizer
from dalle.types import ImageTokenizer, Scorer


def holds_text(path: Path) -> bool:
    """Whether the text tokenizer lies in it: in minDALL-E's folder or archive it does."""
    return mindalle.is_folder(path) or is_archive(path)


def load_external_pipeline(
    path: Path | str,
    text: BPETokenizer | None = None,
    dvae: ImageTokenizer | None = None,
    scorer: Scorer | None = None,
    device: str | torch.device = "cpu",
) -> DALLE:
    """A `DALLE` from a published transformer.

    Args:
        path: the file: DALLE-pytorch's dalle.pt or ruDALL-E's pytorch_model.bin; or minDALL-E's archive 1.3B.tar.gz,
            or its folder.
        text: the text tokenizer of its training (`dalle.text.load_text_tokenizer` reads many); minDALL-E has it, no other does.
            ruDALL-E's bpe.model is made to read lowercase.
        dvae: the image tokenizer of its training; unless given, the one that lies in the file or folder.
        scorer: ranks images.

    Raises:
        ValueError: no such transformer, no text tokenizer, or parts that do not belong together.
    """
    with at_hand(path) as place:
        if text is None and not mindalle.is_folder(place):
            raise ValueError(
                f"{path} does not hold its text tokenizer; give the one that it was trained with"
            )
        text = mindalle.load_tokenizer(place) if text is None else text
        transformer = load_transformer(place, device)
        if isinstance(transformer, Rudalle):
            text = lowercase(text)
            if dvae is None:
                raise ValueError(
                    f"{path} is ruDALL-E's transformer alone; give its image tokenizer too, a VQGAN"
                )
        dvae = load_image_tokenizer(place, device) if dvae is None else dvae
        return DALLE(dvae, transformer, text, scorer)
