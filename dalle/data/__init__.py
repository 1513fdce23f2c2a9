"""Captioned images and their tokens, by number, in an order that depends on the seed alone."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "DataConfig": "config",
        "Loader": "dataloader",
        "PairsLoader": "dataloader",
        "StepOfPairs": "dataloader",
        "TokenCache": "token_cache",
        "first_samples": "dataset",
        "load_images": "dataset",
        "open_dataset": "dataset",
        "open_source": "sources",
        "sample_captions": "dataset",
    },
)
