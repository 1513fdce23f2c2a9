"""Images of what is inside: masks, attention, codes, curves. Each function gives a PIL image or an array.

from dalle import DALLE, viz
model = DALLE.from_pretrained("runs/quickstart/model")
viz.codebook_sheet(model.dvae)
"""

from dalle.viz.attention import attention_image, attention_matrix, attention_weights, spread
from dalle.viz.codebook import (
    code_map,
    code_use_image,
    codebook_images,
    codebook_sheet,
    count_codes,
    reconstructions_image,
)
from dalle.viz.curves import curves_image, losses_image, scales_image
from dalle.viz.masks import figure_11, mask_image, reach_image

__all__ = [
    "attention_image",
    "attention_matrix",
    "attention_weights",
    "code_map",
    "code_use_image",
    "codebook_images",
    "codebook_sheet",
    "count_codes",
    "curves_image",
    "figure_11",
    "losses_image",
    "mask_image",
    "reach_image",
    "reconstructions_image",
    "scales_image",
    "spread",
]
