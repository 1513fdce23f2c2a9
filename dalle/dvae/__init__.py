"""Stage one: the discrete VAE (paper section 2.1)."""

from dalle.dvae.model import DVAE, DVAEConfig

__all__ = ["DVAE", "DVAEConfig"]
