"""Template matching of the shapes, for the judge.

Every shape is laid over an object at nearby positions and sizes, sharp and blurred. The best overlap names
the object's shape, if it is good and clearly better than the second shape's.

    N objects, W pixels per side, S shapes, P poses of a shape, F samples per side of the frame
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.shapes.dataset import SHAPES, signed_distance

MIN_OVERLAP = 0.88  # intersection over union: rendered shapes have at least 0.95, a circle over a square 0.84
MAX_DOUBT = 0.65  # (1 - best overlap) / (1 - second best)

# Lengths below are in square roots of the object's area.
FRAME = 32  # F
FRAME_RADIUS = 1.1  # the tip of a triangle is 0.94 from its centroid
SCALES = (0.92, 0.96, 1.0, 1.04, 1.08)  # of the size from the object's area
SHIFTS = (-0.1, -0.05, 0.0, 0.05, 0.1)  # from the object's centroid
BLURS = (0.0, 0.07, 0.14)  # standard deviations


def match_shapes(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and pose of each object, from how much of each pixel it covers (N, W, W) in [0, 1].

    Overlap is intersection over union, |a b| / (|a|^2 + |b|^2 - |a b|) for soft masks. Gives the index into
    SHAPES (N,), -1 for none of them; center x, center y and extent (N, 3) in image widths.
    """
    line = (torch.arange(cover.shape[1]) + 0.5) / cover.shape[1]
    weight = cover / cover.sum((1, 2), keepdim=True)  # (N, W, W)
    centroid = torch.stack([weight.sum(1) @ line, weight.sum(2) @ line], 1)  # (N, 2) x, y
    unit = cover.mean((1, 2)).sqrt()  # (N,)

    points = centroid[:, None, None] + unit[:, None, None, None] * torch.from_numpy(_frame())
    framed = F.grid_sample(cover[:, None], 2 * points - 1, align_corners=False).flatten(1)  # (N, F * F)
    templates, poses = _templates()
    both = torch.einsum("nf,spf->nsp", framed, templates)
    either = framed.square().sum(1)[:, None, None] + templates.square().sum(2) - both
    overlap, pose = (both / either).max(2)  # (N, S)
    first, second = overlap.topk(2).values.T  # (N,)
    good = (first >= MIN_OVERLAP) & (1 - first <= MAX_DOUBT * (1 - second))

    best = overlap.argmax(1)
    boxes = poses[best, pose[torch.arange(len(best)), best]] * unit[:, None]
    boxes[:, :2] += centroid
    return torch.where(good, best, -1), boxes


def _frame() -> np.ndarray:
    """Sample points, float32 (F, F, 2) of x, y."""
    line = ((np.arange(FRAME) + 0.5) / FRAME * 2 - 1) * FRAME_RADIUS
    return np.stack(np.meshgrid(line, line), -1).astype(np.float32)


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """Coverage (S, P, F * F) and poses (S, P, 3) of the shapes, of area about 1 near the origin."""
    x, y = np.moveaxis(_frame(), -1, 0)
    softness = 2 * FRAME_RADIUS / FRAME  # an edge is as wide as a sample
    poses = np.array([_poses(shape) for shape in SHAPES])  # (S, P, 3)
    covers = []
    for shape, (cx, cy, extent) in zip(SHAPES, poses.transpose(0, 2, 1)[..., None, None], strict=True):
        distance = signed_distance(shape, (x - cx) / extent, (y - cy) / extent) * extent  # (P, F, F)
        covers.append(np.clip(0.5 - distance / softness, 0, 1))
    templates = np.concatenate([blur @ np.array(covers) @ blur for blur in map(_blur_matrix, BLURS)], 1)
    poses = np.tile(poses, (1, len(BLURS), 1))
    return torch.from_numpy(templates).float().flatten(2), torch.from_numpy(poses).float()


def _poses(shape: str) -> list[tuple[float, float, float]]:
    """Center x, center y and extent of the shape of area 1 about the origin, shifted and scaled."""
    line = (np.arange(400) + 0.5) / 400 - 0.5
    rows, columns = np.nonzero(signed_distance(shape, line[None, :], line[:, None]) < 0)
    extent = np.sqrt(line.size**2 / len(rows))
    x, y = -extent * line[columns].mean(), -extent * line[rows].mean()
    return [(x + dx, y + dy, extent * scale) for scale in SCALES for dx in SHIFTS for dy in SHIFTS]


def _blur_matrix(deviation: float) -> np.ndarray:
    """The matrix (F, F) that blurs a row of the frame by a Gaussian."""
    if deviation == 0:
        return np.eye(FRAME)
    line = _frame()[0, :, 0]
    kernel = np.exp(-((line[:, None] - line) ** 2) / (2 * deviation**2))
    return kernel / kernel.sum(1).max()
