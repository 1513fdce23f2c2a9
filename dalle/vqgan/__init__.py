"""VQGAN, a convolutional image tokenizer (Esser et al. 2021), for published weights."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"VQGAN": "model", "VQGANConfig": "config"})
