"""DALL-E (Ramesh et al. 2021): discrete VAE, sparse transformer, CLIP reranker.

from dalle import DALLE
DALLE.from_pretrained("runs/quickstart/model").generate("a red circle above a blue square on a white
background")
"""

from dalle.lazy import lazy_exports

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CLIP": "clip",
        "CLIPConfig": "clip",
        "DALLE": "pipelines.dalle",
        "DVAE": "dvae",
        "DVAEConfig": "dvae",
        "GLIDE": "pipelines.glide",
        "Generation": "pipelines.generation",
        "LoadedModel": "hub.registry",
        "TextTokenizer": "text",
        "TokenLayout": "layout",
        "Transformer": "transformer",
        "TransformerConfig": "transformer",
    },
)
