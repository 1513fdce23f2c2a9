"""A small transformer whose every parameter matters, and a sequence for each of four captions."""

import torch

from dalle.transformer import Transformer, TransformerConfig

SMALL = {"heads": 2, "head_dim": 8, "text_len": 6, "text_vocab": 11, "image_vocab": 13, "conv_kernel": 3}


def small(depth=4, grid=(4, 4), **options):
    """Random in every parameter: at initialization the output matrix is 0."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(depth=depth, grid=grid, **SMALL, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


CAPTIONS = [[3, 1, 4], [], [1, 5, 9, 2, 6], [7]]


def text_of(model, count=None):
    return model.layout.pad_text(CAPTIONS[:count])


def ids_of(model):
    """A sequence for each caption."""
    layout = model.layout
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(layout.image_vocab, (len(CAPTIONS), layout.num_image_tokens), generator=generator)
    return layout.pack(text_of(model), image)
