"""Stage two: the sparse transformer over text and image tokens (paper section 2.2)."""

from dalle.transformer.model import Transformer, TransformerConfig

__all__ = ["Transformer", "TransformerConfig"]
