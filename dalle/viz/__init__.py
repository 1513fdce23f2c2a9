"""Plots of masks, attention, the codebook and training curves, each a function that gives a PIL image.

from dalle import DALLE, viz
model = DALLE.from_pretrained("runs/quickstart/model")
viz.plot_codebook(model.dvae)
"""

from dalle.lazy import lazy_exports

NAMES = {
    "attention": "attention_heatmap attention_shares attention_weights plot_attention",
    "codebook": "count_codes decode_codebook plot_code_usage plot_codebook plot_reconstructions token_map",
    "curves": "plot_curves plot_gradient_scales plot_losses",
    "masks": "plot_figure_11 plot_mask plot_receptive_field",
}
__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {name: module for module, names in NAMES.items() for name in names.split()}
)
