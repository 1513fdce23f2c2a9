"""Caption accuracy judge of the shapes dataset: an image parser without learned parts.

The judge sees the pixels alone. It detects the background and the objects, parses the caption, and compares:

1. every pixel is named after the nearest color; the most common name at the border is the background;
2. squares of one other name are seeds; edges, where colors mix to resemble a third, are too thin or too far
   from it;
3. the pixels around a seed that are nearer to its color than to the others in the image are an object;
4. the shape with the best overlap is the object's shape (template_match.py).

    B images, N objects in them, C colors, M pairs of an image and a color in it, W working resolution
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.shapes.dataset import CELLS, COLORS, GRID, PLACES, SHAPES, Scene, parse_caption
from dalle.shapes.template_match import match_shapes

WORKING = 48  # W; lengths below are in pixels of this resolution
BORDER = 2  # width of the border that names the background
SEED = 5  # side of a seed; an arm of the smallest cross is 7 wide
REACH = 7  # of an object from its seeds: to the tip of a triangle
RIM = 4  # width of the soft edge of an object: a patch of a 12 x 12 grid
PALETTE = torch.tensor(list(COLORS.values())) / 255  # (C, 3)
MAX_COLOR_ERROR = 0.21  # RGB in [0, 1]; a mixture of red and blue is 0.217 from purple
MIN_AREA = 0.03  # of an object; the smallest in the dataset covers 0.09 of the image
MAX_CLUTTER = 2 / 144  # area of neither background nor object: two patches of a 12 x 12 grid


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image; `shape` is None when no shape matches. Lengths in image widths."""

    color: str
    shape: str | None
    center: tuple[float, float]
    extent: float

    @property
    def size(self) -> str:
        """The nearer of small and large."""
        return min(CELLS, key=lambda size: abs(self.extent * GRID - CELLS[size]))

    @property
    def place(self) -> tuple[int, int]:
        """The nearest steps from the middle (x, y), as in PLACES."""
        step = {"small": 3, "large": 2}[self.size] / GRID
        x, y = np.clip(np.round((np.array(self.center) - 0.5) / step), -1, 1)
        return int(x), int(y)


@dataclass(frozen=True)
class Detection:
    """Background (None for an unknown color), objects, and clutter: the share of the area that is neither."""

    background: str | None
    objects: tuple[DetectedObject, ...]
    clutter: float


def matches_caption(pixels: np.ndarray | Tensor, captions: list[str]) -> np.ndarray:
    """Whether each image shows its caption: bool (B,); ValueError for other pixels or captions.

    Pixels are (B, 3, R, R) floats in [0, 1], R at least 32; captions are of the shapes dataset.
    """
    detections = detect(pixels)
    if len(captions) != len(detections):
        raise ValueError(f"{len(detections)} images with {len(captions)} captions; expected one caption each")
    pairs = zip(detections, map(parse_caption, captions), strict=True)
    return np.array([not attribute_errors(found, scene) for found, scene in pairs], dtype=bool)


def attribute_errors(detection: Detection, scene: Scene) -> list[str]:
    """Attributes in which an image differs from a scene, in the best order of its objects: background, count
    (also for clutter), color, shape, relation, place, size."""
    errors = ["background"] if detection.background != scene.background else []
    if len(detection.objects) != len(scene.things) or detection.clutter > MAX_CLUTTER:
        return [*errors, "count"]
    return errors + min((_object_errors(order, scene) for order in permutations(detection.objects)), key=len)


def _object_errors(objects: tuple[DetectedObject, ...], scene: Scene) -> list[str]:
    errors = []
    for found, expected in zip(objects, scene.things, strict=True):
        errors += ["color"] if found.color != expected.color else []
        errors += ["shape"] if found.shape != expected.shape else []
    if scene.relation is None:
        errors += ["place"] if objects[0].place != PLACES[scene.place] else []
        errors += ["size"] if objects[0].size != scene.size else []
        return errors
    right, down = np.subtract(objects[1].center, objects[0].center)
    related = right > abs(down) if scene.relation == "left of" else down > abs(right)
    return errors if related else [*errors, "relation"]


def detect(pixels: np.ndarray | Tensor, batch_size: int = 256) -> list[Detection]:
    """What B images show; arguments and errors as for `matches_caption`."""
    pixels = pixels.detach().cpu() if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] < 32:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}; expected (B, 3, R, R) with R at least 32")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels of type {pixels.dtype}; expected floats in [0, 1]: divide by 255")
    if not ((pixels >= 0) & (pixels <= 1)).all():  # also false for NaN
        raise ValueError(f"pixels from {pixels.min():.3g} to {pixels.max():.3g}; expected floats in [0, 1]")
    return [found for batch in pixels.float().split(batch_size) for found in _detect(batch)]


def _detect(pixels: Tensor) -> list[Detection]:
    pixels = F.interpolate(pixels, WORKING, mode="bilinear", antialias=True)
    errors = torch.stack([_distance(pixels, color[:, None, None]) for color in PALETTE], 1)
    names = errors.min(1).indices  # (B, W, W), from (B, C, W, W)
    border = torch.ones(WORKING, WORKING, dtype=torch.bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    background = names[:, border].mode(1).values  # (B,)
    base = _mean_color(pixels, names == background[:, None, None])  # (B, 3)
    known = _distance(base, PALETTE[background]) <= MAX_COLOR_ERROR  # (B,)
    image, name, tint, masks = _segment(pixels, errors, background)

    occupied = torch.zeros(names.shape).index_add_(0, image, masks.float())  # (B, W, W)
    own = _with_rim(masks, occupied[image] > masks.float())
    shape, poses = match_shapes(_coverage(pixels[image], base[image], tint) * own)
    clutter = ((names != background[:, None, None]) & ~_max_pool(occupied > 0, RIM)).float().mean((1, 2))

    colors, shapes = list(COLORS), [*SHAPES, None]
    objects = [[] for _ in pixels]
    for b, c, s, (x, y, extent) in zip(image, name, shape, poses.tolist(), strict=True):
        objects[b].append(DetectedObject(colors[c], shapes[s], (x, y), extent))
    return [
        Detection(colors[background[b]] if known[b] else None, tuple(objects[b]), float(clutter[b]))
        for b in range(len(pixels))
    ]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Of colors, along dimension 1; ten times as fast as torch's norm."""
    return (a - b).square().sum(1).sqrt()


def _mean_color(pixels: Tensor, mask: Tensor) -> Tensor:
    """(N, 3, W, W) and bool (N, W, W) -> (N, 3)."""
    return (pixels * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]


def _segment(pixels: Tensor, errors: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    """Objects: image (N,) of each, its color name (N,), mean color (N, 3), and mask, bool (N, W, W)."""
    image, name, tint, seeds = _find_seeds(pixels, errors, background)
    seen = F.one_hot(background, len(COLORS)).bool()  # (B, C)
    seen[image, name] = True
    nearest = errors.masked_fill(~seen[:, :, None, None], torch.inf).min(1).indices
    planes = (nearest[image] == name[:, None, None]) & _max_pool(seeds, REACH)  # (M, W, W)

    regions = _connected_regions(planes)
    found = [(m, label) for m, region in enumerate(regions) for label in region.unique().tolist() if label]
    plane, label = torch.tensor(found, dtype=torch.long).reshape(-1, 2).T
    masks = regions[plane] == label[:, None, None]
    large = masks.float().mean((1, 2)) >= MIN_AREA
    plane = plane[large]
    return image[plane], name[plane], tint[plane], masks[large]


def _find_seeds(pixels: Tensor, errors: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    """Colors other than the background that fill a SEED x SEED square.

    Image (M,) of each, color name (M,), mean color (M, 3), centers of the squares, bool (M, W, W).
    """
    error, names = errors.min(1)
    plain = (_max_pool(names, SEED // 2) == -_max_pool(-names, SEED // 2)) & (error <= MAX_COLOR_ERROR)
    plain &= names != background[:, None, None]
    centers = torch.stack([plain & (names == color) for color in range(len(COLORS))], 1)
    image, name = centers.flatten(2).any(2).nonzero().T
    seeds = centers[image, name]
    return image, name, _mean_color(pixels[image], seeds), seeds


def _connected_regions(mask: Tensor) -> Tensor:
    """bool (M, W, W) -> int16 (M, W, W): 0, or the number of the 8-connected region of each pixel."""
    regions = torch.arange(1, WORKING**2 + 1, dtype=torch.int16).reshape(WORKING, WORKING) * mask
    while True:
        spread = _max_pool(regions, 1) * mask
        if torch.equal(spread, regions):
            return regions
        regions = spread


def _with_rim(masks: Tensor, others: Tensor) -> Tensor:
    """Each object with the rim that is nearer to it than to the image's other objects, bool (N, W, W)."""
    own, near, far = masks, masks, others
    for _ in range(RIM):
        near, far = _max_pool(near, 1), _max_pool(far, 1)
        own = own | (near & ~far)
    return own


def _coverage(pixels: Tensor, base: Tensor, tint: Tensor) -> Tensor:
    """Position of each pixel on the line from `base` to `tint`, (N, W, W) in [0, 1]."""
    along = (tint - base) / (tint - base).square().sum(1, keepdim=True)
    return torch.einsum("nchw,nc->nhw", pixels - base[:, :, None, None], along).clamp(0, 1)


def _max_pool(x: Tensor, radius: int) -> Tensor:
    """Maximum over the square of `radius` around each pixel, (B, W, W) of any type; thirty times as fast on a
    CPU as torch's."""
    for dim in (1, 2) * radius:
        source, x = x, x.clone()
        for to, start in ((1, 0), (0, 1)):
            target = x.narrow(dim, to, WORKING - 1)
            torch.maximum(target, source.narrow(dim, start, WORKING - 1), out=target)
    return x
