"""The reranker: a thin layer over open_clip (Radford et al. 2021; paper section 2.6)."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "CLIP": "model",
        "CLIPConfig": "config",
        "CLIPScorer": "model",
        "OpenClipScorer": "model",
        "PretrainedScorer": "model",
    },
)
