"""Inception v3 of 2015: the features of FID and the logits of the inception score.

The network is torchvision's Inception v3 with the pooling of the original: averages leave the padding out,
and the last block takes the maximum (Szegedy et al.'s released graph, and every port of it). Images are
resized to
299 x 299 as TensorFlow 1 did: bilinear, no antialiasing, pixel corners aligned at the upper left. Another
resize gives other numbers (Parmar et al. 2022), so its name stands in each report.

Weights come from a file of the layout `pt_inception-2015-12-05-6726825d.pth`, read without running what is in
it.

    B images
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.evals.weights import file_hash, load_named
from dalle.types import check_images

SIDE = 299
CLASSES = 1008  # of the released graph
RESIZE = "bilinear to 299 x 299 as TensorFlow 1 (no antialiasing, corners at the upper left)"
HOW = (
    "FID and IS need the Inception weights of 2015, pt_inception-2015-12-05-6726825d.pth (91 MB): release "
    "fid_weights of github.com/mseitzer/pytorch-fid or weights-inception-2015-12-05 of "
    "github.com/toshas/torch-fidelity; give the file with --feature-extractor. The word clip in its place takes "
    "the features of the model's own CLIP, whose distance is no FID"
)


class Inception:
    """Pixels -> features and logits.

    Args:
        path: the weights.
        device: where it runs.

    Raises:
        ValueError: no such file, or not of this layout.
    """

    resize, metric = RESIZE, "fid"

    def __init__(self, path: Path | str, device: str | torch.device = "cpu"):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no file {path}. {HOW}")
        self.net = network()
        load_named(self.net, path, HOW)
        self.classes = self.net.fc.weight.detach().to(device)  # (1008, 2048)
        self.net.fc = nn.Identity()
        self.net.to(device).eval().requires_grad_(False)
        self.hash = file_hash(path)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [0, 1] -> features (B, 2048), logits without bias (B, 1008), on the CPU.

        Pixels are rounded to 8 bits first, as those of files are.
        """
        check_images(pixels)
        values = (pixels.to(self.classes.device).float().clamp(0, 1) * 255).round()
        features = self.net((resize_tf1(values, SIDE) - 128) / 128)
        return features.cpu(), (features @ self.classes.T).cpu()


def network() -> nn.Module:
    """torchvision's Inception v3 with the original's pooling and 1,008 classes."""
    from torchvision.models.inception import inception_v3

    net = inception_v3(weights=None, num_classes=CLASSES, aux_logits=False, init_weights=False)
    average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        _pool_by(getattr(net, f"Mixed_{name}"), average)
    _pool_by(net.Mixed_7c, partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))
    return net


def _pool_by(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Its last branch, which pools, does so by `pool`."""
    branches = block._forward
    block._forward = lambda x: [*branches(x)[:-1], block.branch_pool(pool(x))]


def resize_tf1(values: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side): pixel i is read at i * size / side, between its two neighbours."""
    rows, columns = (_weights(size, side).to(values) for size in values.shape[2:])
    return rows @ values @ columns.T


def _weights(size: int, side: int) -> Tensor:
    """(side, size), each row the share of its two neighbours."""
    place = torch.arange(side, dtype=torch.float64) * (size / side)
    low = place.floor().long().clamp(max=size - 1)
    share, at = place - low, torch.arange(side)
    weights = torch.zeros(side, size, dtype=torch.float64)
    weights[at, low] += 1 - share
    weights[at, (low + 1).clamp(max=size - 1)] += share
    return weights
