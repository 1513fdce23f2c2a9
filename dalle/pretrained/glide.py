"""A folder of GLIDE's published files: base, upsampler, noised CLIP and the vocabulary of its text.

OpenAI publishes base.pt, upsample.pt, base_inpaint.pt, upsample_inpaint.pt, clip_image_enc.pt and
clip_text_enc.pt; vocab.bpe.gz is in the repository of github.com/openai/glide-text2im, and is GPT-2's.
"""

from pathlib import Path
from typing import Any

import torch

from dalle.pretrained.glide_clip import NoisedCLIPScorer
from dalle.pretrained.load import load_noised_clip, load_unet
from dalle.text.external.gpt2 import load_gpt2_tokenizer

BASE, UPSAMPLER = ("base.pt", "base_inpaint.pt"), ("upsample.pt", "upsample_inpaint.pt")
"""The plain file and the one for inpainting."""
CLIP = ("clip_image_enc.pt", "clip_text_enc.pt")
VOCABULARIES = ("vocab.bpe", "vocab.bpe.gz", "merges.txt")


def is_glide_folder(path: Path) -> bool:
    """Whether a folder holds one of the published base models."""
    return path.is_dir() and bool(existing(path, *BASE))


def existing(folder: Path, *names: str) -> list[Path]:
    """Those of the files that there are."""
    return [folder / name for name in names if (folder / name).is_file()]


def load_glide(folder: Path, inpainting: bool = False, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Arguments of `GLIDE` from a folder: all files but those of a base model may be missing.

    Args:
        inpainting: prefer the files for inpainting to the plain ones.

    Raises:
        ValueError: no vocabulary, or a file that is not what its name says.
    """
    if not (vocabulary := existing(folder, *VOCABULARIES)):
        raise ValueError(f"{folder} lacks the vocabulary of the text; put GLIDE's vocab.bpe.gz there")
    models = {}
    for part, names in (("base", BASE), ("upsampler", UPSAMPLER)):
        if files := existing(folder, *names):
            models[part] = load_unet(files[-1 if inpainting else 0], device)
    clip = existing(folder, *CLIP)
    scorer = NoisedCLIPScorer(*load_noised_clip(*clip, device)) if len(clip) == 2 else None
    return models | {"text": load_gpt2_tokenizer(vocabulary[0]), "scorer": scorer}
