"""VQGAN: convolutions and a codebook, an image tokenizer of others (Esser et al. 2021); read and run, not trained."""

from dalle.vqgan.model import VQGAN, VQGANConfig

__all__ = ["VQGAN", "VQGANConfig"]
