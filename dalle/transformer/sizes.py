"""Parameters and KV cache memory of the transformer by formula (paper section 2.5, appendix D)."""

import torch

from dalle.nn.kv_cache import KVCacheLayout
from dalle.transformer.config import TransformerConfig


def parameter_counts(config: TransformerConfig) -> dict[str, int]:
    """Parameters of each part by formula.

    Returns:
        embeddings: tokens, text positions, rows and columns; layers: 12 D^2 + 13 D each, the 12 D^2 being
        the paper's "effective parameter count", and 2 head_dim with qk_norm; final_norm; to_logits.
    """
    layout, width = config.layout, config.width
    embedded = layout.embedding_size + layout.text_len + layout.rows + layout.columns
    head_norms = 2 * config.head_dim if config.qk_norm else 0
    return {
        "embeddings": embedded * width,
        "layers": config.depth * (12 * width**2 + 13 * width + head_norms),  # 13 D: norms 4 D, biases 9 D
        "final_norm": 2 * width,
        "to_logits": layout.vocab * width,
    }


def cache_bytes(config: TransformerConfig, itemsize: int) -> tuple[int, int]:
    """KV cache memory: of a caption, shared by its candidates, and of each candidate.

    Args:
        itemsize: bytes of a number, 2 in bf16.
    """
    with torch.device("cpu"):
        places = {
            kind: KVCacheLayout.of_kind(kind, config.layout, config.conv_kernel) for kind in set(config.kinds)
        }
    text = 2 * config.depth * config.text_len * config.width * itemsize
    return text, sum(places[kind].bytes(config.width, itemsize) for kind in config.kinds)
