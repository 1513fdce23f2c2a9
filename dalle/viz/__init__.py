"""Pictures of what is inside: masks, attention, codes, curves. Each function gives a PIL picture or an array.

from dalle import DALLE, viz
model = DALLE.from_pretrained("runs/quickstart/model")
viz.codebook_sheet(model.dvae)
"""

from dalle.viz.attention import attention_matrix, attention_picture, attention_weights, spread
from dalle.viz.codebook import (
    code_map,
    code_use_picture,
    codebook_pictures,
    codebook_sheet,
    count_codes,
    reconstructions_picture,
)
from dalle.viz.curves import curves_picture, losses_picture, scales_picture
from dalle.viz.masks import figure_11, mask_picture, reach_picture

__all__ = [
    "attention_matrix",
    "attention_picture",
    "attention_weights",
    "code_map",
    "code_use_picture",
    "codebook_pictures",
    "codebook_sheet",
    "count_codes",
    "curves_picture",
    "figure_11",
    "losses_picture",
    "mask_picture",
    "reach_picture",
    "reconstructions_picture",
    "scales_picture",
    "spread",
]
