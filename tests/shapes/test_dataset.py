"""The data set of drawn scenes: what is drawn from what, which split, which words, which pixels."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dalle.io.rng import generator
from dalle.runs.batches import CLIPBatch
from dalle.shapes.dataset import (
    CELLS,
    COLORS,
    LATTICE,
    NEW_PAIRS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    STARTS,
    Scene,
    ShapesDataset,
    Thing,
    captions,
    change_one_attribute,
    draw_layout,
    draw_scene,
    parse_caption,
    render,
    signed_distance,
)

AREAS = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 2 * 0.34 - 0.34**2}  # of extent 1


def every_scene() -> list[Scene]:
    scenes = []
    for ground, color, shape in itertools.product(COLORS, COLORS, SHAPES):
        if color == ground:
            continue
        first = Thing(color, shape)
        scenes += [Scene(ground, (first,), place=p, size=s) for p, s in itertools.product(PLACES, SIZES)]
        others = [Thing(c, s) for c, s in itertools.product(COLORS, SHAPES) if c not in (ground, color)]
        scenes += [
            Scene(ground, (first, other), relation=r) for other, r in itertools.product(others, RELATIONS)
        ]
    return scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return every_scene()


def pairs_in(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.color, thing.shape) for thing in scene.things}


class TestDrawing:
    def test_a_image_depends_on_seed_split_and_index_alone(self):
        alone = ShapesDataset(32, seed=3, split="held_out").pixels([7])[0]
        again = ShapesDataset(32, seed=3, split="held_out").pixels([2, 7, 100000])[1]
        np.testing.assert_array_equal(alone, again)

    @pytest.mark.parametrize("other", [{"seed": 4}, {"split": "train"}, {"split": "new_pairs"}])
    def test_another_seed_or_split_is_another_stream(self, other):
        one = ShapesDataset(32, **{"seed": 3, "split": "held_out"})
        two = ShapesDataset(32, **{"seed": 3, "split": "held_out", **other})
        assert [one.scene(i) for i in range(5)] != [two.scene(i) for i in range(5)]

    def test_captions_and_pixels_are_of_the_same_scene(self):
        pairs = ShapesDataset(32)
        for index, wordings in enumerate(pairs.captions(range(20))):
            assert wordings == captions(pairs.scene(index))
        scene = pairs.scene(0)
        corner = pairs.pixels([0])[0, :, 0, 0]
        np.testing.assert_allclose(corner * 255, COLORS[scene.background], atol=1e-3)

    def test_every_resolution_shows_the_same_image(self):
        fine = ShapesDataset(192).pixels(range(4))
        for resolution in (16, 48, 96):
            step = 192 // resolution
            averaged = fine.reshape(4, 3, resolution, step, resolution, step).mean((3, 5))
            assert np.abs(averaged - ShapesDataset(resolution).pixels(range(4))).mean() < 0.01

    def test_two_thirds_of_the_scenes_have_two_things_of_other_colors_than_the_ground(self):
        drawn = [ShapesDataset(16).scene(i) for i in range(2000)]
        assert np.mean([len(scene.things) == 2 for scene in drawn]) == pytest.approx(2 / 3, abs=0.05)
        for scene in drawn:
            colors = [scene.background, *(thing.color for thing in scene.things)]
            assert len(set(colors)) == len(colors)

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="unknown split 'test'; expected one of train"):
            ShapesDataset(48, split="test")

    def test_small_resolution(self):
        with pytest.raises(ValueError, match="resolution 15 is too small"):
            ShapesDataset(15)


class TestSplits:
    def test_new_pairs_are_an_eighth_of_the_pairs_and_each_shape_once(self):
        assert len(NEW_PAIRS) * 8 == len(COLORS) * len(SHAPES)
        assert {shape for _, shape in NEW_PAIRS} == set(SHAPES)
        assert {color for color, _ in NEW_PAIRS} <= set(COLORS)

    @pytest.mark.parametrize("split", SPLITS)
    def test_scenes_are_drawn_from_their_split(self, split):
        pairs = ShapesDataset(16, split=split)
        for scene in map(pairs.scene, range(1000)):
            assert scene.split == split
            assert bool(pairs_in(scene) & NEW_PAIRS) == (split == "new_pairs")

    def test_splits_are_disjoint(self):
        drawn = {split: {ShapesDataset(16, split=split).scene(i) for i in range(1000)} for split in SPLITS}
        for one, two in itertools.combinations(SPLITS, 2):
            assert not drawn[one] & drawn[two]

    def test_a_tenth_is_held_out(self, scenes):
        counts = {split: sum(scene.split == split for scene in scenes) for split in SPLITS}
        assert counts["held_out"] / (counts["held_out"] + counts["train"]) == pytest.approx(0.1, abs=0.01)


class TestCaptions:
    def test_every_wording_of_every_scene_is_read_back(self, scenes):
        for scene in scenes:
            for caption in captions(scene):
                assert parse_caption(caption) == scene

    def test_wordings(self):
        above = Scene("yellow", (Thing("red", "circle"), Thing("blue", "square")), relation="above")
        assert captions(above) == [
            "a red circle above a blue square on a yellow background",
            "a blue square below a red circle on a yellow background",
            "on a yellow background, a red circle above a blue square",
            "a yellow background with a blue square below a red circle",
            "a red circle with a blue square below it on a yellow background",
        ]
        alone = Scene("white", (Thing("cyan", "cross"),), place="at the top left", size="small")
        assert captions(alone) == [
            "a small cyan cross at the top left on a white background",
            "on a white background, a small cyan cross at the top left",
            "a white background with a small cyan cross at the top left",
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "a dog on a skateboard",
            "a red circle",
            "a red circle on a yellow background",
            "a small red circle on a yellow background",
            "a red circle in the middle on a yellow background",
            "a red circle above a blue square",
            "a red circle near a blue square on a yellow background",
            "a red circle above a blue square on a yellow background, honestly",
            "a small red circle above a large blue square on a yellow background",
            "not a red circle above a blue square on a yellow background",
            "a pink circle above a blue square on a yellow background",
            "a red circle above a blue square above a green cross on a yellow background",
        ],
    )
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError, match="not a caption of the shapes set"):
            parse_caption(text)


class TestImages:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("extent", [0.42, 0.67])
    @pytest.mark.parametrize("resolution", [48, 64, 96])
    def test_coverage_is_the_area_of_the_shape(self, shape, extent, resolution):
        scene = Scene("black", (Thing("white", shape),), place="in the middle", size="small")
        box = np.array([[[0.503, 0.496, extent], [0, 0, 0]]])
        image = render([scene], box, resolution)[0, 0]
        dark, light = COLORS["black"][0] / 255, COLORS["white"][0] / 255
        area = ((image - dark) / (light - dark)).mean()
        assert area == pytest.approx(AREAS[shape] * extent**2, rel=0.01)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_edges_are_anti_aliased_and_the_rest_is_plain(self, shape):
        scene = Scene("black", (Thing("white", shape),), place="in the middle", size="large")
        image = render([scene], np.array([[[0.503, 0.496, 0.65], [0, 0, 0]]]), 48)[0, 0] * 255
        mixed = (image > 25.5) & (image < 244.5)
        assert 40 < mixed.sum() < 3 * 4 * 0.65 * 48  # a line about the shape, at most three pixels wide
        assert set(np.unique(np.round(image[~mixed]))) == {25, 245}

    def test_pixels_contract(self):
        pixels = ShapesDataset(40).pixels(range(3))
        assert pixels.shape == (3, 3, 40, 40)
        assert pixels.dtype == np.float32
        assert pixels.min() >= 0
        assert pixels.max() <= 1

    @pytest.mark.parametrize("split", SPLITS)
    def test_things_are_large_apart_and_inside(self, split):
        rng = np.random.default_rng(0)
        for _ in range(1000):
            scene = draw_scene(rng, split)
            boxes = draw_layout(scene, rng)[: len(scene.things)]
            low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
            assert (boxes[:, 2] >= 5 / 12).all()  # five patches of a 12 x 12 grid
            assert low.min() >= 0
            assert high.max() <= 1
            if scene.relation is not None:
                axis = RELATIONS.index(scene.relation)
                assert high[0, axis] < low[1, axis]

    @pytest.mark.parametrize("split", SPLITS)
    def test_things_start_at_and_extend_over_whole_cells(self, split):
        rng = np.random.default_rng(0)
        for _ in range(500):
            boxes = LATTICE * draw_layout(draw_scene(rng, split), rng)
            start = boxes[:, :2] - boxes[:, 2:] / 2
            np.testing.assert_allclose(start, start.round(), atol=1e-9)
            assert set(boxes[:, 2].round(9)) <= {0, 5, 8}

    def test_every_start_of_every_place_occurs(self):
        rng = np.random.default_rng(0)
        for size, place in itertools.product(SIZES, PLACES):
            scene = Scene("red", (Thing("blue", "circle"),), place=place, size=size)
            boxes = LATTICE * np.stack([draw_layout(scene, rng)[0] for _ in range(200)])
            starts = {
                tuple(b) for b in np.column_stack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2]]).round(9)
            }
            x, y = PLACES[place]
            expected = {
                (left, top, extent)
                for extent in [CELLS[size]]
                for left, top in itertools.product(STARTS[extent][x + 1], STARTS[extent][y + 1])
            }
            assert starts == expected

    def test_unknown_shape(self):
        with pytest.raises(ValueError, match="unknown shape 'star'; expected one of circle"):
            signed_distance("star", np.zeros(1), np.zeros(1))


class TestChangeOneAttribute:
    def differences(self, one: Scene, two: Scene) -> list[str]:
        if one.relation is not None and (two.things == one.things[::-1] or two.relation != one.relation):
            kept = sorted(map(str, one.things)) == sorted(map(str, two.things))
            return (
                ["relation"] + ["background"] * (one.background != two.background) + ["things"] * (not kept)
            )
        names = [n for n in ("background", "place", "size", "relation") if getattr(one, n) != getattr(two, n)]
        for before, after in zip(one.things, two.things, strict=True):
            names += [n for n in ("color", "shape") if getattr(before, n) != getattr(after, n)]
        return names

    def test_exactly_one_attribute_differs_and_every_kind_occurs(self):
        rng = np.random.default_rng(0)
        kinds = set()
        for _ in range(2000):
            scene = draw_scene(rng, "train")
            (kind,) = self.differences(scene, change_one_attribute(scene, rng))
            kinds.add(kind)
        assert kinds == {"background", "color", "shape", "relation", "place", "size"}

    def test_colors_stay_different_and_the_scene_can_be_said(self):
        rng = np.random.default_rng(0)
        for _ in range(1000):
            changed = change_one_attribute(draw_scene(rng, "train"), rng)
            colors = [changed.background, *(thing.color for thing in changed.things)]
            assert len(set(colors)) == len(colors)
            assert parse_caption(captions(changed)[0]) == changed


@pytest.mark.parametrize("split", SPLITS)
def test_siblings_differ_in_one_attribute_and_stay_in_their_split(split):
    pairs = ShapesDataset(32, split=split, siblings=True)
    scenes = [pairs.scene(index) for index in range(400)]
    assert {scene.split for scene in scenes} == {split}
    neighbours = sum(_differences(a, b) == 1 for a, b in zip(scenes[::2], scenes[1::2], strict=True))
    assert neighbours >= (200 if split == "train" else 150)  # few held-out scenes have no held-out neighbour


def _differences(a, b) -> int:
    """Attributes in which two scenes differ; two things that swap places are one difference."""
    if len(a.things) == 2 and a.things == b.things[::-1]:
        return 1 + (a.background != b.background)
    fields = sum(getattr(a, name) != getattr(b, name) for name in ("background", "relation", "place", "size"))
    pairs = zip(a.things, b.things, strict=False)
    return fields + sum((x.color != y.color) + (x.shape != y.shape) for x, y in pairs)


def test_the_wording_says_nothing_about_what_differs():
    """Scene and wording come from streams of their own: else the wording would give the sibling away to CLIP."""
    pairs, said = ShapesDataset(16, siblings=True), []
    text = SimpleNamespace(encode=lambda caption: said.append(caption) or [0])
    CLIPBatch(text, seed=0)(pairs.load([(0, i) for i in range(4000)]))
    counts = np.zeros((2, 5))
    for index in range(1, 4000, 2):
        one, two = pairs.scene(index - 1), pairs.scene(index)
        if one.relation and two.relation:
            counts[int(one.background != two.background), captions(two).index(said[index])] += 1
    expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 18.5  # 4 degrees of freedom, one in a thousand


def test_streams_of_different_purposes_are_different():
    draws = {purpose: generator(purpose, 1, 2).random() for purpose in ("scene", "caption", "crop", "order")}
    assert len(set(draws.values())) == 4
    assert generator("scene", 1, 2).random() == draws["scene"] != generator("scene", 2, 1).random()
