"""LPIPS: how unlike two images look, by the layers of AlexNet (Zhang et al. 2018, version 0.1).

Each layer's states are made unit vectors at every place; their squared differences, weighted by what people
were found to see, are averaged over places and added up over layers. Two files hold the weights:
torchvision's AlexNet, and the five layers' weights that Zhang et al. fitted.

    B images
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from dalle.evals.weights import file_hash, load_named, read_weights
from dalle.types import check_images

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1], released code
LAYERS = (1, 4, 7, 9, 11)  # AlexNet's five ReLUs
SMALLEST = 32  # pixels on a side that leave a place in the last layer
HOW = (
    "LPIPS needs two files: --lpips-backbone alexnet-owt-7be5be79.pth, torchvision's AlexNet, and "
    "--lpips-weights alex.pth, from lpips/weights/v0.1 of the Python package lpips"
)


class LPIPS:
    """Pixels and others -> distances.

    Args:
        backbone: torchvision's AlexNet.
        weights: of the five layers.
        device: where it runs.

    Raises:
        ValueError: a file that lacks, or is another.
    """

    def __init__(self, backbone: Path, weights: Path, device: str | torch.device = "cpu"):
        from torchvision.models import alexnet

        with torch.device("meta"):  # its classifier, which is not needed, is nine tenths of it
            self.net = alexnet(weights=None).features[: LAYERS[-1] + 1]
        load_named(self.net, backbone, HOW, "features.")
        self.net.to(device).eval().requires_grad_(False)
        found = read_weights(weights, HOW)
        names = [f"lin{i}.model.1.weight" for i in range(len(LAYERS))]
        widths = [layer.out_channels for layer in self.net if isinstance(layer, nn.Conv2d)]
        shapes = {name: (1, width, 1, 1) for name, width in zip(names, widths, strict=True)}
        if {name: tuple(tensor.shape) for name, tensor in found.items()} != shapes:
            raise ValueError(f"{weights} does not hold the weights of AlexNet's five layers. {HOW}")
        self.weights = [found[name].float().flatten().to(device) for name in names]
        self.hash = f"{file_hash(backbone)}-{file_hash(weights)}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, others: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], twice -> (B,), 0 for equal images."""
        if min(pixels.shape[2:]) < SMALLEST:
            raise ValueError(
                f"LPIPS needs images of {SMALLEST} x {SMALLEST} pixels or more, got {pixels.shape[2:]}"
            )
        total = 0
        for a, b, weight in zip(self._layers(pixels), self._layers(others), self.weights, strict=True):
            total = total + torch.einsum("bchw,c->bhw", (a - b).square(), weight).mean((1, 2))
        return total

    def _layers(self, pixels: Tensor) -> list[Tensor]:
        check_images(pixels)
        shift, scale = (pixels.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        x, found = (2 * pixels - 1 - shift) / scale, []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in LAYERS:
                found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found
