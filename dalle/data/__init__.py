"""Datasets of captioned images and their tokens, dataloaders, and token caches."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "BatchReader": "dataloader",
        "DataConfig": "config",
        "ImageTextLoader": "dataloader",
        "Loader": "dataloader",
        "TokenCache": "token_cache",
        "first_samples": "dataset",
        "open_dataset": "dataset",
        "open_source": "sources",
        "sample_captions": "dataset",
    },
)
