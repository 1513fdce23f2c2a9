"""DALL-E (Ramesh et al. 2021): dVAE, sparse transformer, CLIP reranker.

    from dalle import DALLE
    DALLE.from_pretrained("runs/quickstart/model").generate("a red circle above a blue square on a white background")

Importing does no work: the names below are fetched when first used.
"""

from importlib import import_module

_HOMES = {
    "CLIP": "dalle.clip",
    "CLIPConfig": "dalle.clip",
    "DALLE": "dalle.pipelines.dalle",
    "DVAE": "dalle.dvae",
    "DVAEConfig": "dalle.dvae",
    "Generation": "dalle.pipelines.generation",
    "LoadedModel": "dalle.hub.registry",
    "TextTokenizer": "dalle.text",
    "TokenLayout": "dalle.layout",
    "Transformer": "dalle.transformer",
    "TransformerConfig": "dalle.transformer",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dalle' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
