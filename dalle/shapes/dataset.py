"""The embedded data set: an endless, seeded stream of drawn scenes with captions.

One or two plain shapes stand on a colored ground: "a red circle above a blue square on a yellow
background". Every number is drawn from (seed, index), so image i is always image i. Things start at,
and extend over, whole twelfths of the image, five or more: a small dVAE whose patches are twelfths can
show them, and the edge of a shape crosses its patches in few ways (docs/log.md).

Two parts of the scenes are never drawn for training: `held_out`, a tenth of all scenes chosen by hash,
and `new_pairs`, scenes with a color-shape pair that no training scene has on any object.

    B batch, K two object slots, R resolution in pixels; lengths are in image widths, x right, y down.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dalle.io.rng import generator
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
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "above")  # of the first thing to the second
PLACES = {  # of a thing that stands alone: steps from the middle (x, y)
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
# One color-shape pair in eight, each shape once: training never shows them.
NEW_PAIRS = frozenset({("red", "circle"), ("blue", "square"), ("yellow", "triangle"), ("black", "cross")})
SPLITS = ("train", "held_out", "new_pairs")

LATTICE = 12  # cells on a side
STARTS = {  # extent of a thing in cells: where it may start, at the left or top, in the middle, at the right or bottom
    5: ((0, 1), (3, 4), (6, 7)),
    8: ((0,), (2,), (4,)),
}
PAIR_STARTS = (
    (0, 6),
    (0, 7),
    (1, 7),
)  # of two things, along the axis of their relation: a cell or two between them
CELLS = {"small": 5, "large": 8}  # width of a thing
EXTENT = {size: cells / LATTICE for size, cells in CELLS.items()}  # the same in image widths
PLACE_STEP = {"small": 3 / LATTICE, "large": 2 / LATTICE}  # from the middle to a place at the side, about

_OPPOSITE = {"left of": "right of", "above": "below"}
_DIRECTION = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True)
class Thing:
    """One drawn object."""

    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says. Two things have a relation; one thing has a place and a size.

    The first of two things is the left or the upper one, so that each scene has one spelling.
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
        return "held_out" if int.from_bytes(digest) % 10 == 0 else "train"


def draw_scene(rng: np.random.Generator, split: str) -> Scene:
    """A scene of the split: two things in two thirds of the cases, all colors in it different."""
    while True:
        scene = _any_scene(rng)
        if scene.split == split:
            return scene


def _any_scene(rng: np.random.Generator) -> Scene:
    background, *colors = rng.permutation(list(COLORS))[:3].tolist()
    shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=2)]
    things = tuple(Thing(c, s) for c, s in zip(colors, shapes, strict=True))
    if rng.random() < 2 / 3:
        return Scene(background, things, relation=RELATIONS[rng.integers(2)])
    place = list(PLACES)[rng.integers(len(PLACES))]
    return Scene(background, things[:1], place=place, size=SIZES[rng.integers(2)])


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene that differs from the given one in one attribute: a color, a shape, the ground,
    the relation (two things swap places or turn) or the place or size of one thing."""
    choices = (
        ["background", "color", "shape", "relation"]
        if scene.relation
        else ["background", "color", "shape", "place", "size"]
    )
    what = choices[rng.integers(len(choices))]
    used = {scene.background, *(thing.color for thing in scene.things)}
    which = int(rng.integers(len(scene.things)))
    if what == "background":
        return replace(scene, background=_other(COLORS, used, rng))
    if what == "color":
        return _with_thing(scene, which, color=_other(COLORS, used, rng))
    if what == "shape":
        return other_shape(scene, which, rng)
    if what == "place":
        return replace(scene, place=_other(PLACES, {scene.place}, rng))
    if what == "size":
        return replace(scene, size=_other(SIZES, {scene.size}, rng))
    turned = replace(scene, relation=_other(RELATIONS, {scene.relation}, rng))
    swapped = replace(scene, things=scene.things[::-1])
    return (turned, swapped)[rng.integers(2)]


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


# ---------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------


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
    relation, opposite = _DIRECTION[scene.relation], _DIRECTION[_OPPOSITE[scene.relation]]
    return [
        f"{a} {relation} {b} on {ground}",
        f"{b} {opposite} {a} on {ground}",
        f"on {ground}, {a} {relation} {b}",
        f"{ground} with {b} {opposite} {a}",
        f"{a} with {b} {opposite} it on {ground}",
    ]


_THING = re.compile(rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
_GROUND = re.compile(rf"({'|'.join(COLORS)}) background")
_PLACE = re.compile("|".join(sorted(PLACES, key=len, reverse=True)))
_RELATION = re.compile(r"left of|right of|above|below")


def parse_caption(caption: str) -> Scene:
    """The scene that a caption in one of our wordings describes; ValueError for any other text."""
    scene = _find_scene(caption)
    if scene is None or caption not in captions(scene):
        example = "a red circle above a blue square on a yellow background"
        raise ValueError(f"not a caption of the shapes set: {caption!r}; expected a wording like {example!r}")
    return scene


def _find_scene(text: str) -> Scene | None:
    things, ground = _THING.findall(text), _GROUND.search(text)
    relation, place = _RELATION.search(text), _PLACE.search(text)
    if ground and len(things) == 1 and place:
        size, color, shape = things[0]
        return Scene(ground[1], (Thing(color, shape),), place=place[0], size=size)
    if ground and len(things) == 2 and relation:
        first, second = (Thing(color, shape) for _, color, shape in things)
        if text.endswith(f"it on a {ground[1]} background"):  # "a with b below it": b is below a
            first, second = second, first
        if relation[0] in RELATIONS:
            return Scene(ground[1], (first, second), relation=relation[0])
        return Scene(ground[1], (second, first), relation="left of" if relation[0] == "right of" else "above")
    return None


# ---------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------


def draw_layout(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Where the things stand: (K, 3) of centre x, centre y, extent; extent 0 for an empty slot."""
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
    return cells / LATTICE


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of extent 1 about the origin, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.5
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.5
    if shape == "cross":
        long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return np.maximum(long - 0.5, short - 0.17)
    if shape == "triangle":  # upright, base and height 1
        return np.maximum((2 * np.abs(x) - y - 0.5) / np.sqrt(5), y - 0.5)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def render(scenes: Sequence[Scene], boxes: np.ndarray, resolution: int) -> np.ndarray:
    """Anti-aliased images.

    Args:
        scenes: B scenes.
        boxes: (B, K, 3) from `draw_layout`.
        resolution: R, pixels on a side.

    Returns:
        float32 (B, 3, R, R) in [0, 1].
    """
    centres = ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)
    grounds = np.array([COLORS[scene.background] for scene in scenes], np.float32)
    images = np.tile(grounds[:, :, None, None], (1, 1, resolution, resolution))
    for b, scene in enumerate(scenes):
        for thing, (cx, cy, extent) in zip(scene.things, boxes[b].astype(np.float32), strict=False):
            x, y = (centres[None, :] - cx) / extent, (centres[:, None] - cy) / extent
            distance = signed_distance(thing.shape, x, y) * extent * resolution  # in pixels
            cover = np.clip(0.5 - distance, 0, 1)
            color = np.array(COLORS[thing.color], np.float32)[:, None, None]
            images[b] += cover * (color - images[b])
    return images / 255


class ShapesDataset:
    """Endless captioned images. Image i depends on (seed, split, i) alone.

    Args:
        resolution: pixels on a side.
        seed: another seed is another set.
        split: "train", "held_out" or "new_pairs".
        siblings: every odd image differs from the one before it in one attribute (for CLIP).
    """

    size = None

    def __init__(self, resolution: int, seed: int = 0, split: str = "train", siblings: bool = False):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if resolution < 16:
            raise ValueError(f"resolution {resolution} is too small to draw shapes; expected 16 or more")
        self.resolution, self.seed, self.split, self.siblings = resolution, seed, split, siblings
        self.hash = f"shapes-{resolution}-{seed}-{split}" + "-siblings" * siblings

    def _generator(self, index: int) -> np.random.Generator:
        return generator("scene", self.seed, SPLITS.index(self.split), index)

    def scene(self, index: int) -> Scene:
        """The scene of image `index`."""
        return self._draw(index, self._generator(index))

    def _draw(self, index: int, rng: np.random.Generator) -> Scene:
        if not (self.siblings and index % 2):
            return draw_scene(rng, self.split)
        elder = self.scene(index - 1)
        for _ in range(100):
            scene = change_one_attribute(elder, rng)
            if scene.split == self.split:
                return scene
        return draw_scene(rng, self.split)  # a held-out scene may have no held-out neighbour

    def drawn(self, indices: Sequence[int]) -> tuple[list[Scene], np.ndarray]:
        """The scenes of images and where their things stand, (B, K, 3) as `draw_layout`."""
        generators = [self._generator(index) for index in indices]
        scenes = [self._draw(index, rng) for index, rng in zip(indices, generators, strict=True)]
        return scenes, np.stack([draw_layout(s, rng) for s, rng in zip(scenes, generators, strict=True)])

    def pixels(self, indices: Sequence[int]) -> np.ndarray:
        """float32 (B, 3, R, R) in [0, 1]; drawn images are never cropped."""
        return render(*self.drawn(indices), self.resolution)

    def load(
        self, samples: Sequence[tuple[int, int]], augment: str = "none", seed: int = 0, replace: bool = False
    ) -> ImageTextBatch:
        """Images and wordings of (epoch, index) samples; whatever the epoch, they are the same."""
        indices = [index for _, index in samples]
        return ImageTextBatch(self.pixels(indices), self.captions(indices), list(samples))

    def captions(self, indices: Sequence[int]) -> list[list[str]]:
        """All wordings of each image."""
        return [captions(self.scene(index)) for index in indices]
