"""VQGAN: convolutions and a codebook, an image tokenizer of others (Esser et al. 2021); read and run, not trained."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "VQGAN": "model",
        "VQGANConfig": "model",
    },
)
