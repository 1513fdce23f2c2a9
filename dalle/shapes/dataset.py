"""Synthetic dataset of captioned shapes: endless, seeded, rendered when read.

One or two shapes on a colored background: "a red circle above a blue square on a yellow background". Image i
depends on (seed, split, i) alone. Boxes of shapes are whole cells of a 12 x 12 grid, for a small dVAE whose
patches are these cells. Shapes share their parts: a circle is a dome and a bowl, a cross a bar and a pillar.

Training never sees two kinds of scenes: `val`, a tenth of all scenes chosen by hash, and `new_pairs`,
scenes with a color-shape pair that no training scene contains.

    B batch, K = 2 boxes of an image, R resolution in pixels; lengths in image widths, x right, y down
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np

from dalle.sampling import generator
from dalle.types import ImageTextBatch

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (250, 215, 50),
    "purple": (150, 60, 180),
    "cyan": (80, 205, 230),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
SHAPES = (
    *("circle", "dome", "bowl", "triangle", "diamond", "square"),
    *("bar", "pillar", "cross", "tee", "corner", "arch"),
)
SIZES = ("small", "large")
WORDINGS = {"left of": ("to the left of", "to the right of"), "above": ("above", "below")}
RELATIONS = tuple(WORDINGS)  # of the first shape to the second
PLACES = {  # of a single shape: steps from the middle (x, y)
    "at the top left": (-1, -1),
    "at the top": (0, -1),
    "at the top right": (1, -1),
    "on the left": (-1, 0),
    "in the middle": (0, 0),
    "on the right": (1, 0),
    "at the bottom left": (-1, 1),
    "at the bottom": (0, 1),
    "at the bottom right": (1, 1),
}
NEW_COLORS = (
    *("red", "green", "cyan", "yellow", "purple", "blue"),
    *("white", "yellow", "black", "red", "blue", "green"),
)
NEW_PAIRS = frozenset(zip(NEW_COLORS, SHAPES, strict=True))  # one pair in eight, each shape once
SPLITS = ("train", "val", "new_pairs")

GRID = 12  # cells per side
CELLS = {"small": 5, "large": 8}  # width of a shape in cells
# First cells of a shape of each width: at the left or top, in the middle, at the right or bottom.
STARTS = {5: ((0, 1), (3, 4), (6, 7)), 8: ((0,), (2,), (4,))}
PAIR_STARTS = ((0, 6), (0, 7), (1, 7))  # first cells of two shapes along the axis of their relation


@dataclass(frozen=True)
class Thing:
    """A shape of a color."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption describes: two things with a relation, or one thing with a place and a size.

    The first of two things is the left or the upper one. `split` hashes the repr: renamed classes or fields
    change it.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    place: str | None = None
    size: str | None = None

    @property
    def split(self) -> str:
        """Which of SPLITS the scene belongs to."""
        if any((thing.color, thing.shape) in NEW_PAIRS for thing in self.things):
            return "new_pairs"
        digest = hashlib.blake2b(repr(self).encode(), digest_size=2).digest()
        return "val" if int.from_bytes(digest) % 10 == 0 else "train"


def sample_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of the split: two things in two thirds of the cases, all colors in it different."""
    while True:
        background, *colors = rng.permutation(list(COLORS))[:3].tolist()
        shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=2)]
        things = tuple(map(Thing, colors, shapes))
        if rng.random() < 2 / 3:
            scene = Scene(background, things, relation=RELATIONS[rng.integers(2)])
        else:
            place = list(PLACES)[rng.integers(len(PLACES))]
            scene = Scene(background, things[:1], place=place, size=SIZES[rng.integers(2)])
        if scene.split == split:
            return scene


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with another background, color, shape, relation (turned or swapped), place or size."""
    attributes = ["background", "color", "shape", *(["relation"] if scene.relation else ["place", "size"])]
    attribute = attributes[rng.integers(len(attributes))]
    used = {scene.background, *(thing.color for thing in scene.things)}
    which = int(rng.integers(len(scene.things)))
    if attribute == "background":
        return replace(scene, background=_other(COLORS, used, rng))
    if attribute == "color":
        return _with_thing(scene, which, color=_other(COLORS, used, rng))
    if attribute == "shape":
        return other_shape(scene, which, rng)
    values = {"relation": RELATIONS, "place": PLACES, "size": SIZES}[attribute]
    changed = replace(scene, **{attribute: _other(values, {getattr(scene, attribute)}, rng)})
    if attribute == "relation" and rng.integers(2):
        return replace(scene, things=scene.things[::-1])
    return changed


def other_shape(scene: Scene, which: int, rng: np.random.Generator) -> Scene:
    """The scene with another shape for one of its things."""
    return _with_thing(scene, which, shape=_other(SHAPES, {scene.things[which].shape}, rng))


def _other(names: Sequence[str] | dict, used: set, rng: np.random.Generator) -> str:
    free = [name for name in names if name not in used]
    return free[rng.integers(len(free))]


def _with_thing(scene: Scene, which: int, **changes: str) -> Scene:
    things = list(scene.things)
    things[which] = replace(things[which], **changes)
    return replace(scene, things=tuple(things))


def captions(scene: Scene) -> list[str]:
    """Every wording of a scene."""
    ground = f"a {scene.background} background"
    if scene.relation is None:
        thing = f"a {scene.size} {scene.things[0]}"
        return [
            f"{thing} {scene.place} on {ground}",
            f"on {ground}, {thing} {scene.place}",
            f"{ground} with {thing} {scene.place}",
        ]
    a, b = (f"a {thing}" for thing in scene.things)
    relation, opposite = WORDINGS[scene.relation]
    return [
        f"{a} {relation} {b} on {ground}",
        f"{b} {opposite} {a} on {ground}",
        f"on {ground}, {a} {relation} {b}",
        f"{ground} with {b} {opposite} {a}",
        f"{a} with {b} {opposite} it on {ground}",
    ]


@cache
def parse_caption(caption: str) -> Scene:
    """The scene of a caption in any of its wordings; ValueError for other text."""
    colors, shapes = "|".join(COLORS), "|".join(SHAPES)
    ground = "".join(re.findall(f"a ({colors}) background", caption))
    things = tuple(Thing(*pair) for pair in re.findall(f"({colors}) ({shapes})", caption))
    candidates = []
    if len(things) == 1:
        candidates = [Scene(ground, things, place=p, size=s) for p, s in product(PLACES, SIZES)]
    elif len(things) == 2:
        orders = (things, things[::-1])
        candidates = [Scene(ground, order, relation=r) for order, r in product(orders, RELATIONS)]
    for scene in candidates:
        if caption in captions(scene):
            return scene
    example = "a red circle above a blue square on a yellow background"
    raise ValueError(f"not a caption of the shapes set: {caption!r}; expected a wording like {example!r}")


def sample_boxes(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A box for each thing: (K, 3) of center x, center y, extent; extent 0 where there is no second thing."""
    cells = np.zeros((2, 3))  # left, top, extent
    if scene.relation is None:
        extent = CELLS[scene.size]
        cells[0] = *(rng.choice(STARTS[extent][step + 1]) for step in PLACES[scene.place]), extent
    else:
        along = PAIR_STARTS[rng.integers(len(PAIR_STARTS))]
        across = rng.integers(3, 5, size=2)
        cells[:, :2] = np.stack([along, across] if scene.relation == "left of" else [across, along], 1)
        cells[:, 2] = CELLS["small"]
    cells[:, :2] += cells[:, 2:] / 2
    return cells / GRID


E, H = 1 / 2, 3 / 16  # half the side, half the width of an arm: edges halve the cells of both sizes
RECTANGLES = {  # left, top, right, bottom
    "square": [(-E, -E, E, E)],
    "bar": [(-E, -H, E, H)],
    "pillar": [(-H, -E, H, E)],
    "cross": [(-E, -H, E, H), (-H, -E, H, E)],
    "tee": [(-E, -E, E, -H), (-H, -E, H, E)],
    "corner": [(-E, -E, -H, E), (-E, H, E, E)],
    "arch": [(-E, -E, E, -H), (-E, -E, -H, E), (H, -E, E, E)],
}
"""Shapes of extent 1 around the origin that are a union of rectangles."""


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of extent 1 centered at the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.5
    if shape in ("dome", "bowl"):  # half a circle, as high as half its width
        up = y if shape == "dome" else -y
        return np.maximum(np.hypot(x, up - 0.25) - 0.5, up - 0.25)
    if shape == "triangle":  # upright, base and height 1
        return np.maximum((2 * np.abs(x) - y - 0.5) / np.sqrt(5), y - 0.5)
    if shape == "diamond":
        return (np.abs(x) + np.abs(y) - 0.5) / np.sqrt(2)
    if shape in RECTANGLES:
        x, y = np.broadcast_arrays(x, y)
        sides = [(x0 - x, x - x1, y0 - y, y - y1) for x0, y0, x1, y1 in RECTANGLES[shape]]
        return np.max(sides, axis=1).min(axis=0)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def render(scenes: Sequence[Scene], boxes: np.ndarray, resolution: int) -> np.ndarray:
    """Anti-aliased images of B scenes with boxes (B, K, 3): float32 (B, 3, R, R) in [0, 1]."""
    centers = ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)
    grounds = np.array([COLORS[scene.background] for scene in scenes], np.float32)
    images = np.tile(grounds[:, :, None, None], (1, 1, resolution, resolution))
    for b, scene in enumerate(scenes):
        for thing, (cx, cy, extent) in zip(scene.things, boxes[b].astype(np.float32), strict=False):
            x, y = (centers[None, :] - cx) / extent, (centers[:, None] - cy) / extent
            distance = signed_distance(thing.shape, x, y) * extent * resolution  # in pixels
            cover = np.clip(0.5 - distance, 0, 1)
            color = np.array(COLORS[thing.color], np.float32)[:, None, None]
            images[b] += cover * (color - images[b])
    return images / 255


class ShapesDataset:
    """Endless dataset of captioned shapes; a `CaptionedImages`.

    With `siblings` every odd image differs from the one before it in one attribute (hard negatives for CLIP).
    """

    size = None

    def __init__(self, resolution: int, seed: int = 0, split: str = "train", siblings: bool = False):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if resolution < 16:
            raise ValueError(f"resolution {resolution} is too small for shapes; expected 16 or more")
        self.resolution, self.seed, self.split, self.siblings = resolution, seed, split, siblings
        self.hash = f"shapes-{resolution}-{seed}-{split}{'-siblings' if siblings else ''}"

    def _sample(self, index: int) -> tuple[Scene, np.random.Generator]:
        rng = generator("scene", self.seed, SPLITS.index(self.split), index)
        if self.siblings and index % 2:
            sibling = self.scene(index - 1)
            for _ in range(100):  # a held-out scene may have no held-out neighbor
                scene = change_one_attribute(sibling, rng)
                if scene.split == self.split:
                    return scene, rng
        return sample_scene(rng, self.split), rng

    def scene(self, index: int) -> Scene:
        """The scene of an image."""
        return self._sample(index)[0]

    def scenes_and_boxes(self, indices: Sequence[int]) -> tuple[list[Scene], np.ndarray]:
        """The scenes of images and their boxes (B, K, 3), as `sample_boxes`."""
        scenes, rngs = zip(*map(self._sample, indices), strict=True)
        return list(scenes), np.stack([sample_boxes(s, rng) for s, rng in zip(scenes, rngs, strict=True)])

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """float32 (B, 3, R, R) in [0, 1]."""
        return render(*self.scenes_and_boxes(indices), self.resolution)

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """Images and wordings of (epoch, index) samples; never cropped, the same in every epoch."""
        indices = [index for _, index in samples]
        return ImageTextBatch(self.pixels(indices), self.captions(indices), list(samples))

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All wordings of each image."""
        return [captions(self.scene(index)) for index in indices]
