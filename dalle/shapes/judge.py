"""Does an image show what its caption says? A judge for the shapes set that reads the pixels.

The judge learns nothing and is never told where things ought to be. It reads an image into a `Reading`
(the ground color and a list of things with color, shape, centre and extent), reads the caption into a
`Scene`, and names the attributes in which the two disagree:

1. every pixel takes the name of the nearest color; the name most common at the border is the ground;
2. a square of pixels of one other name is a seed of a thing: edges, which are mixtures of two colors and
   often look like a third, are too thin, or too far from the third, to seed one;
3. around a seed, the pixels nearer to the thing's color than to the other colors seen are the thing;
4. the shape that overlaps best with them is its shape (shapes_fit.py).

    B images, N things in them, C colors, M pairs of image and color in it, W working resolution.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.shapes.dataset import COLORS, EXTENT, PLACE_STEP, PLACES, Scene, parse_caption
from dalle.shapes.template_match import fit_shapes

WORKING = 48  # pixels on a side of the images as read; the lengths in pixels below are in these
RING = 2  # width of the border that names the ground
SEED = 5  # width of the square that seeds a thing; an arm of the smallest cross is 7 wide
REACH = 7  # how far a thing's pixels may lie from a seed: the tip of a triangle does
RIM = 4  # width of the soft edge about a thing: a patch of a 12 x 12 grid
MAX_COLOR_ERROR = 0.21  # RGB in [0, 1]; a mixture of two colors, red and blue, is 0.217 from a third, purple
MIN_THING = 0.03  # of the image's area; the smallest thing drawn covers 0.09
MAX_LITTER = 2 / 144  # area that is neither ground nor thing: two patches of a 12 x 12 grid


@dataclass(frozen=True)
class SeenThing:
    """A thing as read; its shape is None when it is like none of ours. Lengths in image widths."""

    color: str
    shape: str | None
    centre: tuple[float, float]
    extent: float

    @property
    def size(self) -> str:
        """small or large, divided half way between the two."""
        return "small" if self.extent < (EXTENT["small"] + EXTENT["large"]) / 2 else "large"

    @property
    def place(self) -> tuple[int, int]:
        """Steps from the middle (x, y), divided half way between the steps."""
        steps = np.round((np.array(self.centre) - 0.5) / PLACE_STEP[self.size])
        return tuple(int(step) for step in np.clip(steps, -1, 1))


@dataclass(frozen=True)
class Reading:
    """What an image shows. The ground is None when its color is like none of ours; `litter` is the part
    of the area that is neither ground nor thing."""

    ground: str | None
    things: tuple[SeenThing, ...]
    litter: float


# ---------------------------------------------------------------------------------------------
# Reading against caption
# ---------------------------------------------------------------------------------------------


def matches_caption(pixels: np.ndarray | Tensor, captions: list[str]) -> np.ndarray:
    """Whether each image shows what its caption says.

    Args:
        pixels: (B, 3, R, R) floats in [0, 1], R at least 32.
        captions: B captions of the shapes set.

    Returns:
        bool (B,).

    Raises:
        ValueError: pixels of another rank, type or range; another number of captions; a caption that is
            not of the shapes set.
    """
    readings = read_images(pixels)
    if len(captions) != len(readings):
        raise ValueError(f"{len(readings)} images with {len(captions)} captions; expected one caption each")
    scenes = [parse_caption(caption) for caption in captions]
    return np.array([not disagreements(r, s) for r, s in zip(readings, scenes, strict=True)], dtype=bool)


def accuracy(pixels: np.ndarray | Tensor, captions: list[str]) -> float:
    """The part of the images that show what their captions say; arguments and errors as for `matches_caption`."""
    if len(captions) == 0:
        raise ValueError("no images to judge; expected at least one")
    return float(matches_caption(pixels, captions).mean())


def disagreements(reading: Reading, scene: Scene) -> list[str]:
    """Names of the attributes in which an image and a caption differ; empty when it shows the scene.

    Names: background, count (of things, or litter), color, shape, relation, place, size. Things are
    matched in the order that leaves the fewest disagreements.
    """
    wrong = ["background"] if reading.ground != scene.background else []
    if len(reading.things) != len(scene.things) or reading.litter > MAX_LITTER:
        return [*wrong, "count"]
    return wrong + min((_compare(order, scene) for order in permutations(reading.things)), key=len)


def _compare(things: tuple[SeenThing, ...], scene: Scene) -> list[str]:
    wrong = []
    for seen, said in zip(things, scene.things, strict=True):
        wrong += ["color"] if seen.color != said.color else []
        wrong += ["shape"] if seen.shape != said.shape else []
    if scene.relation is not None:
        return wrong if _related(*things, scene.relation) else [*wrong, "relation"]
    wrong += ["place"] if things[0].place != PLACES[scene.place] else []
    wrong += ["size"] if things[0].size != scene.size else []
    return wrong


def _related(first: SeenThing, second: SeenThing, relation: str) -> bool:
    right, down = np.subtract(second.centre, first.centre)
    return bool(right > abs(down) if relation == "left of" else down > abs(right))


# ---------------------------------------------------------------------------------------------
# Pixels to reading
# ---------------------------------------------------------------------------------------------


def read_image(pixels: np.ndarray | Tensor) -> Reading:
    """Reads one image, (3, R, R) floats in [0, 1]; ValueError as for `matches_caption`."""
    return read_images(pixels[None])[0]


def read_images(pixels: np.ndarray | Tensor, chunk: int = 256) -> list[Reading]:
    """Reads images, (B, 3, R, R) floats in [0, 1], `chunk` at a time; ValueError as for `matches_caption`."""
    pixels = _checked(pixels)
    return [reading for part in pixels.split(chunk) for reading in _read(part)]


def _checked(pixels: np.ndarray | Tensor) -> Tensor:
    pixels = pixels.detach().cpu() if isinstance(pixels, Tensor) else torch.from_numpy(np.array(pixels))
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3] or pixels.shape[2] < 32:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}; expected (B, 3, R, R) with R at least 32")
    if not pixels.is_floating_point():
        raise ValueError(f"pixels of type {pixels.dtype}; expected floats in [0, 1]: divide by 255")
    if not ((pixels >= 0) & (pixels <= 1)).all():  # also false for NaN
        raise ValueError(f"pixels from {pixels.min():.3g} to {pixels.max():.3g}; expected floats in [0, 1]")
    return pixels.float()


def _read(pixels: Tensor) -> list[Reading]:
    """(B, 3, R, R) -> B readings."""
    pixels = F.interpolate(pixels, WORKING, mode="bilinear", antialias=True)
    away = _distances(pixels)  # (B, C, W, W)
    names = away.min(1).indices  # (B, W, W)
    ground = _border_name(names)  # (B,)
    base = _mean_color(pixels, names == ground[:, None, None])  # (B, 3)
    image, name, tint, masks = _things(pixels, away, ground)  # (N,), (N,), (N, 3), (N, W, W)

    occupied = torch.zeros(names.shape).index_add_(0, image, masks.float())  # (B, W, W)
    own = _territory(masks, occupied[image] > masks.float())
    fits = fit_shapes(_coverage(pixels[image], base[image], tint) * own)
    litter = ((names != ground[:, None, None]) & ~_highest(occupied > 0, RIM)).float().mean((1, 2))

    things = [[] for _ in pixels]
    for b, c, fit in zip(image.tolist(), name.tolist(), fits, strict=True):
        things[b].append(SeenThing(list(COLORS)[c], fit.shape, fit.centre, fit.extent))
    return [
        Reading(list(COLORS)[c] if ok else None, tuple(seen), part)
        for c, ok, seen, part in zip(ground, _near(base, ground), things, litter.tolist(), strict=True)
    ]


def _palette() -> Tensor:
    return torch.tensor(list(COLORS.values())) / 255  # (C, 3)


def _distances(pixels: Tensor) -> Tensor:
    """(B, 3, W, W) -> (B, C, W, W), RGB distance of each pixel to each color."""
    return torch.stack([(pixels - color[:, None, None]).square().sum(1).sqrt() for color in _palette()], 1)


def _mean_color(pixels: Tensor, where: Tensor) -> Tensor:
    """(N, 3, W, W) and bool (N, W, W) -> (N, 3)."""
    return (pixels * where[:, None]).sum((2, 3)) / where.sum((1, 2))[:, None]


def _near(tint: Tensor, name: Tensor) -> Tensor:
    """Whether each tint (N, 3) is near enough to the color of its name (N,) to be called so."""
    return (tint - _palette()[name]).square().sum(1).sqrt() <= MAX_COLOR_ERROR


def _border_name(names: Tensor) -> Tensor:
    """(B, W, W) -> (B,), the color most common at the border."""
    ring = torch.ones(WORKING, WORKING, dtype=torch.bool)
    ring[RING:-RING, RING:-RING] = False
    return names[:, ring].mode(1).values


def _things(pixels: Tensor, away: Tensor, ground: Tensor) -> tuple[Tensor, ...]:
    """Finds the things in images.

    Returns:
        image (N,) that each thing is in, its name (N,), its tint (N, 3), and its pixels, bool (N, W, W).
    """
    image, name, tint, seeds = _colors_seen(pixels, away, ground)
    seen = F.one_hot(ground, len(COLORS)).bool()  # (B, C)
    seen[image, name] = True
    nearest = away.masked_fill(~seen[:, :, None, None], torch.inf).min(1).indices
    planes = (nearest[image] == name[:, None, None]) & _highest(seeds, REACH)

    regions = _regions(planes).flatten(1)  # (M, W * W)
    found = [(m, i) for m, row in enumerate(regions) for i in row.unique().tolist() if i]
    plane, region = torch.tensor(found, dtype=torch.long).reshape(-1, 2).T
    masks = (regions[plane] == region[:, None]).unflatten(1, planes.shape[1:])
    big = masks.float().mean((1, 2)) >= MIN_THING
    plane = plane[big]
    return image[plane], name[plane], tint[plane], masks[big]


def _colors_seen(pixels: Tensor, away: Tensor, ground: Tensor) -> tuple[Tensor, ...]:
    """Finds the colors besides the ground's of which an image has whole SEED x SEED squares, with a
    middle near enough to that color.

    Returns:
        for each of M: image (M,), name (M,), mean color (M, 3), those middles, bool (M, W, W).
    """
    error, names = away.min(1)
    plain = (_highest(names, SEED // 2) == -_highest(-names, SEED // 2)) & (error <= MAX_COLOR_ERROR)
    middles = torch.stack(
        [plain & (names == c) & (ground != c)[:, None, None] for c in range(len(COLORS))], 1
    )
    image, name = middles.flatten(2).any(2).nonzero().T
    seeds = middles[image, name]
    tint = _mean_color(pixels[image], seeds)
    return image, name, tint, seeds


def _regions(mask: Tensor) -> Tensor:
    """bool (M, W, W) -> int16 (M, W, W): 0, or 1 + the last pixel of the connected region that it is in."""
    regions = torch.arange(1, WORKING**2 + 1, dtype=torch.int16).reshape(WORKING, WORKING) * mask
    while True:
        spread = _highest(regions, 1) * mask
        if torch.equal(spread, regions):
            return regions
        regions = spread


def _territory(masks: Tensor, others: Tensor) -> Tensor:
    """Each thing with the rim that is nearer to it than to the image's other things, bool (N, W, W)."""
    own = masks
    near, far = masks, others
    for _ in range(RIM):
        near, far = _highest(near, 1), _highest(far, 1)
        own = own | (near & ~far)
    return own


def _coverage(pixels: Tensor, base: Tensor, tip: Tensor) -> Tensor:
    """How far each pixel is on the way from the color `base` to `tip`, (N, W, W) in [0, 1]."""
    along = (tip - base) / (tip - base).square().sum(1, keepdim=True)
    return torch.einsum("nchw,nc->nhw", pixels - base[:, :, None, None], along).clamp(0, 1)


def _highest(x: Tensor, radius: int) -> Tensor:
    """The highest value in the square of `radius` about each pixel, (B, W, W) of any type. Shifted
    comparisons: thirty times as fast as a max-pool on a CPU."""
    for axis in (1, 2) * radius:
        spread, inner = x.clone(), WORKING - 1
        for to, origin in ((1, 0), (0, 1)):
            target = spread.narrow(axis, to, inner)
            torch.maximum(target, x.narrow(axis, origin, inner), out=target)
        x = spread
    return x
