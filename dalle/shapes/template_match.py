"""Which shape is this blot? Every shape of the shapes set is laid over it at nearby positions and sizes,
sharp and blurred, and the one with the best overlap is its shape, if it is good enough and clearly better
than the others. A part of the judge in shapes_judge.py; nothing in it is learned.

    N blots, W pixels on a side, S shapes, P poses of a shape, F samples across the frame of comparison.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.shapes.dataset import SHAPES, signed_distance

MIN_OVERLAP = 0.88  # intersection over union: drawings have 0.95 or more, a circle over a square 0.84
MAX_DOUBT = 0.65  # what the best shape lacks of a perfect overlap, as a part of what the second lacks

# Lengths below are in square roots of the blot's area.
FRAME, FRAME_HALF = (
    32,
    1.1,
)  # F, and half the width of the frame: the tip of a triangle is 0.94 from its centroid
SCALES = (0.92, 0.96, 1.0, 1.04, 1.08)  # of the size that the blot's area gives
SHIFTS = (-0.1, -0.05, 0.0, 0.05, 0.1)  # from the position that its centroid gives
BLURS = (0.0, 0.07, 0.14)  # standard deviations


@dataclass(frozen=True)
class Fit:
    """The best shape for a blot, None when none is good; lengths in image widths."""

    shape: str | None
    centre: tuple[float, float]  # x right, y down
    extent: float
    overlap: float


def fit_shapes(cover: Tensor) -> list[Fit]:
    """Fits a shape to each blot.

    Args:
        cover: (N, W, W) in [0, 1], how much of each pixel the blot covers; none may be empty.

    Overlap is intersection over union, carried over to soft edges: with masks of zeros and ones, |a b|
    over |a|^2 + |b|^2 - |a b| is just that.
    """
    line = (torch.arange(cover.shape[1]) + 0.5) / cover.shape[1]
    weight = cover / cover.sum((1, 2), keepdim=True)  # (N, W, W)
    centroid = torch.stack([weight.sum(1) @ line, weight.sum(2) @ line], 1)  # (N, 2) x, y
    unit = cover.mean((1, 2)).sqrt()  # (N,)

    points = centroid[:, None, None] + unit[:, None, None, None] * torch.from_numpy(_frame())
    framed = F.grid_sample(cover[:, None], 2 * points - 1, align_corners=False).flatten(1)  # (N, F * F)
    templates, poses = _templates()  # (S, P, F * F), (S, P, 3)
    both = torch.einsum("nf,spf->nsp", framed, templates)
    either = framed.square().sum(1)[:, None, None] + templates.square().sum(2) - both
    overlap, pose = (both / either).max(2)  # (N, S)
    first, second = overlap.topk(2).values.T  # (N,)
    good = (first >= MIN_OVERLAP) & (1 - first <= MAX_DOUBT * (1 - second))

    best = overlap.argmax(1)
    x, y, extent = (poses[best, pose[torch.arange(len(best)), best]] * unit[:, None]).T
    rows = zip(best, good, centroid[:, 0] + x, centroid[:, 1] + y, extent, first, strict=True)
    return [
        Fit(SHAPES[s] if ok else None, (float(x), float(y)), float(e), float(o)) for s, ok, x, y, e, o in rows
    ]


def _frame() -> np.ndarray:
    """Sample points of the frame, float32 (F, F, 2) of x, y."""
    line = ((np.arange(FRAME) + 0.5) / FRAME * 2 - 1) * FRAME_HALF
    return np.stack(np.meshgrid(line, line), -1).astype(np.float32)


@lru_cache
def _templates() -> tuple[Tensor, Tensor]:
    """Every shape of area about 1, centroid about the origin: coverage (S, P, F * F) and poses (S, P, 3) of
    centre x, centre y, extent."""
    x, y = np.moveaxis(_frame(), -1, 0)
    softness = 2 * FRAME_HALF / FRAME  # an edge is as wide as a sample
    poses = np.array([_poses(shape) for shape in SHAPES])  # (S, P, 3)
    covers = np.empty((*poses.shape[:2], FRAME, FRAME))
    for s, p in np.ndindex(*poses.shape[:2]):
        cx, cy, extent = poses[s, p]
        distance = signed_distance(SHAPES[s], (x - cx) / extent, (y - cy) / extent) * extent
        covers[s, p] = np.clip(0.5 - distance / softness, 0, 1)
    templates = np.concatenate([blur @ covers @ blur for blur in map(_blur, BLURS)], 1)
    poses = np.tile(poses, (1, len(BLURS), 1))
    return torch.from_numpy(templates.astype(np.float32)).flatten(2), torch.from_numpy(
        poses.astype(np.float32)
    )


def _poses(shape: str) -> list[tuple[float, float, float]]:
    """Centre x, centre y and extent of the shape of area 1 about its centroid, and of its neighbours."""
    line = (np.arange(400) + 0.5) / 400 - 0.5
    rows, columns = np.nonzero(signed_distance(shape, line[None, :], line[:, None]) < 0)
    extent = np.sqrt(line.size**2 / len(rows))
    x, y = -extent * line[columns].mean(), -extent * line[rows].mean()
    return [(x + dx, y + dy, extent * scale) for scale in SCALES for dx in SHIFTS for dy in SHIFTS]


def _blur(deviation: float) -> np.ndarray:
    """The matrix (F, F) that blurs a line of the frame by a Gaussian."""
    if deviation == 0:
        return np.eye(FRAME)
    line = _frame()[0, :, 0]
    kernel = np.exp(-((line[:, None] - line) ** 2) / (2 * deviation**2))
    return kernel / kernel.sum(1).max()
