"""A drawing of matplotlib as an image."""

from io import BytesIO

from matplotlib.figure import Figure
from PIL import Image


def figure_image(figure: Figure, dpi: int = 110) -> Image.Image:
    """RGB, `dpi` pixels to the inch of the figure's size."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return Image.open(buffer).convert("RGB")
