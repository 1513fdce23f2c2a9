"""Plots of masks, attention, the codebook and training curves, each a function that gives a PIL image.

from dalle import DALLE, viz
model = DALLE.from_pretrained("runs/quickstart/model")
viz.plot_codebook(model.dvae)
"""

from dalle.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "attention_heatmap": "attention",
        "attention_shares": "attention",
        "attention_weights": "attention",
        "count_codes": "codebook",
        "decode_codebook": "codebook",
        "plot_attention": "attention",
        "plot_code_usage": "codebook",
        "plot_codebook": "codebook",
        "plot_curves": "curves",
        "plot_figure_11": "masks",
        "plot_gradient_scales": "curves",
        "plot_losses": "curves",
        "plot_mask": "masks",
        "plot_receptive_field": "masks",
        "plot_reconstructions": "codebook",
        "token_map": "codebook",
    },
)
