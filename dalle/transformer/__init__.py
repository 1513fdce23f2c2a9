"""Stage two: the sparse transformer over text and image tokens (paper section 2.2)."""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"Transformer": "model", "TransformerConfig": "config"}
)
