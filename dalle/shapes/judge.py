"""Caption accuracy judge of the shapes dataset: an image parser without learned parts.

The judge sees the pixels alone. It detects the background and the objects, parses the caption, and compares:

1. every pixel is named after the nearest color; the most common name at the border is the background;
2. squares of one other name are seeds; edges, where colors mix to resemble a third, are too thin or too far
   from it;
3. the pixels around a seed that are nearer to its color than to the others in the image are an object;
4. every shape is laid over an object at nearby positions and sizes, sharp and blurred; the best overlap names
   the object's shape, if it is good and clearly better than the second shape's.

    B images, N objects in them, C colors, M pairs of an image and a color in it, W working resolution
    S shapes, P poses of a shape, F samples per side of the frame that an object is sampled in
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.io.images import check_images
from dalle.shapes.dataset import CELLS, COLORS, GRID, PLACES, SHAPES, Scene, parse_caption, signed_distance

WORKING = 48  # W; lengths below are in pixels of this resolution
BORDER = 2  # width of the border that names the background
SEED = 5  # side of a seed; an arm of the smallest cross is 7 wide
REACH = 7  # of an object from its seeds: to the tip of a triangle
RIM = 4  # width of the soft edge of an object: a patch of a 12 x 12 grid
PALETTE = torch.tensor(list(COLORS.values())) / 255  # (C, 3)
MAX_COLOR_ERROR = 0.21  # RGB in [0, 1]; a mixture of red and blue is 0.217 from purple
MIN_AREA = 0.03  # of an object; the smallest in the dataset covers 0.09 of the image
MAX_CLUTTER = 2 / 144  # area of neither background nor object: two patches of a 12 x 12 grid
MIN_OVERLAP = 0.88  # intersection over union: rendered shapes have at least 0.95, a circle over a square 0.84
MAX_DOUBT = 0.65  # (1 - best overlap) / (1 - second best)

# Lengths below are in square roots of the object's area.
FRAME = 32  # F
FRAME_RADIUS = 1.1  # the tip of a triangle is 0.94 from its centroid
FRAME_LINE = (((np.arange(FRAME) + 0.5) / FRAME * 2 - 1) * FRAME_RADIUS).astype(np.float32)  # of samples
SCALES = (0.92, 0.96, 1.0, 1.04, 1.08)  # of the size from the object's area
SHIFTS = (-0.1, -0.05, 0.0, 0.05, 0.1)  # from the object's centroid
BLURS = (0.0, 0.07, 0.14)  # standard deviations


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
        errors += [name for name in ("color", "shape") if getattr(found, name) != getattr(expected, name)]
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
    if len(pixels):
        check_images(pixels)
    if pixels.shape[2] != pixels.shape[3] or pixels.shape[2] < 32:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}; expected (B, 3, R, R) with R at least 32")
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
    own, near, far = masks, masks, occupied[image] > masks.float()
    for _ in range(RIM):  # with the rim that is nearer to the object than to the image's others
        near, far = _max_pool(near, 1), _max_pool(far, 1)
        own = own | (near & ~far)
    # Position of each pixel on the line from the color of the background to that of the object.
    base = base[image]
    along = (tint - base) / (tint - base).square().sum(1, keepdim=True)
    cover = torch.einsum("nchw,nc->nhw", pixels[image] - base[:, :, None, None], along).clamp(0, 1)
    shape, poses = match_shapes(cover * own)
    clutter = ((names != background[:, None, None]) & ~_max_pool(occupied > 0, RIM)).float().mean((1, 2))

    colors, shapes = list(COLORS), [*SHAPES, None]
    objects = [[] for _ in pixels]
    for b, c, s, (x, y, extent) in zip(image, name, shape, poses.tolist(), strict=True):
        objects[b].append(DetectedObject(colors[c], shapes[s], (x, y), extent))
    return [
        Detection(colors[background[b]] if known[b] else None, tuple(objects[b]), float(clutter[b]))
        for b in range(len(pixels))
    ]


def _segment(pixels: Tensor, errors: Tensor, background: Tensor) -> tuple[Tensor, ...]:
    """Objects: image (N,) of each, its color name (N,), mean color (N, 3), and mask, bool (N, W, W)."""
    error, names = errors.min(1)
    plain = (_max_pool(names, SEED // 2) == -_max_pool(-names, SEED // 2)) & (error <= MAX_COLOR_ERROR)
    plain &= names != background[:, None, None]
    centers = torch.stack([plain & (names == color) for color in range(len(COLORS))], 1)  # of seeds
    image, name = centers.flatten(2).any(2).nonzero().T  # (M,)
    seeds = centers[image, name]  # (M, W, W)
    tint = _mean_color(pixels[image], seeds)
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


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Of colors, along dimension 1; ten times as fast as torch's norm."""
    return (a - b).square().sum(1).sqrt()


def _mean_color(pixels: Tensor, mask: Tensor) -> Tensor:
    """(N, 3, W, W) and bool (N, W, W) -> (N, 3)."""
    return (pixels * mask[:, None]).sum((2, 3)) / mask.sum((1, 2))[:, None]


def _connected_regions(mask: Tensor) -> Tensor:
    """bool (M, W, W) -> int16 (M, W, W): 0, or the number of the 8-connected region of each pixel."""
    regions = torch.arange(1, WORKING**2 + 1, dtype=torch.int16).reshape(WORKING, WORKING) * mask
    while True:
        spread = _max_pool(regions, 1) * mask
        if torch.equal(spread, regions):
            return regions
        regions = spread


def _max_pool(x: Tensor, radius: int) -> Tensor:
    """Maximum over the square of `radius` around each pixel of (B, W, W); thirty times as fast as torch's."""
    for dim in (1, 2) * radius:
        source, x = x, x.clone()
        for to, start in ((1, 0), (0, 1)):
            target = x.narrow(dim, to, WORKING - 1)
            torch.maximum(target, source.narrow(dim, start, WORKING - 1), out=target)
    return x


def match_shapes(cover: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and pose of each object, from how much of each pixel it covers (N, W, W) in [0, 1].

    Overlap is intersection over union, |a b| / (|a|^2 + |b|^2 - |a b|) for soft masks. Gives the index into
    SHAPES (N,), -1 for none of them; center x, center y and extent (N, 3) in image widths.
    """
    line = (torch.arange(cover.shape[1]) + 0.5) / cover.shape[1]
    weight = cover / cover.sum((1, 2), keepdim=True)  # (N, W, W)
    centroid = torch.stack([weight.sum(1) @ line, weight.sum(2) @ line], 1)  # (N, 2) x, y
    unit = cover.mean((1, 2)).sqrt()  # (N,)

    frame = torch.from_numpy(np.stack(np.meshgrid(FRAME_LINE, FRAME_LINE), -1))  # (F, F, 2) x, y
    points = centroid[:, None, None] + unit[:, None, None, None] * frame
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


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """Coverage (S, P, F * F) and poses (S, P, 3) of the shapes, of area about 1 near the origin."""
    x, y = FRAME_LINE[None, :], FRAME_LINE[:, None]
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
    kernel = np.exp(-((FRAME_LINE[:, None] - FRAME_LINE) ** 2) / (2 * deviation**2))
    return kernel / kernel.sum(1).max()
