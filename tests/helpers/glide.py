"""Small GLIDE models with random weights."""

from functools import cache

import torch

from dalle.pipelines.glide import GLIDE
from dalle.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from dalle.unet import DiffusionConfig, UNet, UNetConfig

PROMPT = "a red cross above a blue circle"
SIZES = {"width": 32, "channel_mult": (1, 1), "blocks": 1, "head_width": 32, "dropout": 0.1}
SIZES |= {"text_len": 16, "text_vocab": 300, "text_width": 32, "text_layers": 1, "text_heads": 1}


@cache
def text_tokenizer() -> TextTokenizer:
    return train_text_tokenizer([PROMPT], TextTokenizerConfig(vocab_size=300))


def unet(size: int, seed: int = 0, caption_dropout: float = 0.2, **fields) -> UNet:
    """All weights random, also those that begin at zero, so that the images depend on every input."""
    fields = {"diffusion": DiffusionConfig("cosine", 60, "x0", caption_dropout)} | SIZES | fields
    model = UNet(UNetConfig(image_size=size, **{"attention": (size // 2,)} | fields))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
            spread = 0.5 if parameter.ndim == 1 else 0.7 * parameter[0].numel() ** -0.5
            spread = 0.1 * spread if name == "out.2.weight" else spread  # few values are clipped
            parameter.copy_(around + spread * torch.randn(parameter.shape, generator=rng))
    return model


def glide(inpainting: bool = False, upsampler: bool = True, scorer=None, **fields) -> GLIDE:
    """8 x 8 pixels, upsampled to 16 x 16."""
    fields |= {"inpainting": inpainting}
    larger = unet(16, seed=1, low_resolution=True, **fields) if upsampler else None
    return GLIDE(unet(8, **fields), larger, text=text_tokenizer(), scorer=scorer)
