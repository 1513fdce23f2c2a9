"""Images of what is inside: masks, attention, codes, curves. Each function gives a PIL image or an array.

from dalle import DALLE, viz
model = DALLE.from_pretrained("runs/quickstart/model")
viz.codebook_sheet(model.dvae)
"""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "attention_image": "attention",
        "attention_matrix": "attention",
        "attention_weights": "attention",
        "code_map": "codebook",
        "code_use_image": "codebook",
        "codebook_images": "codebook",
        "codebook_sheet": "codebook",
        "count_codes": "codebook",
        "curves_image": "curves",
        "figure_11": "masks",
        "losses_image": "curves",
        "mask_image": "masks",
        "reach_image": "masks",
        "reconstructions_image": "codebook",
        "scales_image": "curves",
        "spread": "attention",
    },
)
