"""Captioned pictures and their tokens, by number, in an order that depends on the seed alone."""

from dalle.data.dataloader import Loader, PairsLoader, StepOfPairs
from dalle.data.dataset import PairsConfig, draw_captions, first_pairs, open_pairs, pixels_of_samples
from dalle.data.sources import open_source
from dalle.data.token_cache import TokenCache

__all__ = [
    "Loader",
    "PairsConfig",
    "PairsLoader",
    "StepOfPairs",
    "TokenCache",
    "draw_captions",
    "first_pairs",
    "open_pairs",
    "open_source",
    "pixels_of_samples",
]
