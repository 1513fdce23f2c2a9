"""Captioned images and their tokens, by number, in an order that depends on the seed alone."""

from dalle.data.dataloader import Loader, PairsLoader, StepOfPairs
from dalle.data.dataset import DataConfig, first_samples, load_images, open_dataset, sample_captions
from dalle.data.sources import open_source
from dalle.data.token_cache import TokenCache

__all__ = [
    "DataConfig",
    "Loader",
    "PairsLoader",
    "StepOfPairs",
    "TokenCache",
    "first_samples",
    "load_images",
    "open_dataset",
    "open_source",
    "sample_captions",
]
