"""U-Net of diffusion models (Dhariwal and Nichol 2021; Nichol et al. 2021), and a classifier for guidance."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    dict.fromkeys(("ClassifierConfig", "DiffusionConfig", "UNetConfig"), "config")
    | {"Classifier": "classifier", "UNet": "model"},
)
