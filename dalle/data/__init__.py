"""Captioned pictures and their tokens, by number, in an order that depends on the seed alone."""

from dalle.data.loader import Loader, PairsLoader, StepOfPairs
from dalle.data.pairs import PairsConfig, draw_captions, first_pairs, open_pairs, pixels_of_samples
from dalle.data.sources import open_source
from dalle.data.tokens import TokenCache

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
