"""Stage one: the discrete VAE (paper section 2.1)."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"DVAE": "model", "DVAEConfig": "config", "DVAELossConfig": "config"}
)
