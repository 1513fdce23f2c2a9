"""Captioned pictures and their tokens, by number, in an order that depends on the seed alone."""

from dalle.data.pairs import PairsConfig, open_pairs, pixels_of_samples
from dalle.data.tokens import TokenCache

__all__ = ["PairsConfig", "TokenCache", "open_pairs", "pixels_of_samples"]
