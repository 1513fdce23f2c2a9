"""The shapes dataset: scenes, splits, captions, boxes, pixels (dalle/shapes/dataset.py)."""

from collections import Counter
from itertools import permutations, product
from types import SimpleNamespace

import numpy as np
import pytest

from dalle.runs.batches import CLIPBatch
from dalle.shapes import dataset as shapes
from dalle.shapes.judge import attribute_errors, detect

ARM, REST = 3 / 8, 5 / 16  # width of the bar, the pillar and the arms; what they leave on each side
AREAS = {  # of extent 1
    **{"circle": np.pi / 4, "dome": np.pi / 8, "bowl": np.pi / 8, "triangle": 1 / 2, "diamond": 1 / 2},
    **{"square": 1, "bar": ARM, "pillar": ARM, "cross": 1 - 4 * REST**2, "tee": REST + ARM * (1 - REST)},
    **{"corner": 1 - (1 - REST) ** 2, "arch": 1 - ARM * (1 - REST)},
}


def sampled_scenes(split: str, count: int = 1000, **options) -> list[shapes.Scene]:
    dataset = shapes.ShapesDataset(16, split=split, **options)
    return [dataset.scene(index) for index in range(count)]


def single_scenes() -> list[shapes.Scene]:
    """All scenes of one thing."""
    words = product(permutations(shapes.COLORS, 2), shapes.SHAPES, shapes.PLACES, shapes.SIZES)
    return [
        shapes.Scene(background, (shapes.Thing(color, shape),), place=place, size=size)
        for (background, color), shape, place, size in words
    ]


class TestScenes:
    def test_an_image_depends_on_seed_split_and_index_alone(self):
        alone = shapes.ShapesDataset(32, seed=3, split="val").pixels([7])[0]
        again = shapes.ShapesDataset(32, seed=3, split="val").pixels([2, 7, 100000])[1]
        np.testing.assert_array_equal(alone, again)
        others = ((seed, split) for seed in (3, 4) for split in shapes.SPLITS)
        scenes = [tuple(sampled_scenes(split, 5, seed=seed)) for seed, split in others]
        assert len(set(scenes)) == 6

    def test_two_thirds_of_the_scenes_have_two_things_and_all_colors_differ(self):
        scenes = sampled_scenes("train", 2000)
        assert np.mean([len(scene.things) == 2 for scene in scenes]) == pytest.approx(2 / 3, abs=0.05)
        for scene in scenes:
            colors = [scene.background, *(thing.color for thing in scene.things)]
            assert len(set(colors)) == len(colors)


class TestSplits:
    @pytest.mark.parametrize("split", shapes.SPLITS)
    def test_a_dataset_has_the_scenes_of_its_split(self, split):
        for scene in sampled_scenes(split):
            assert scene.split == split
            pairs = {(thing.color, thing.shape) for thing in scene.things}
            assert bool(pairs & shapes.NEW_PAIRS) == (split == "new_pairs")

    def test_one_pair_in_eight_is_new_with_every_shape_once(self):
        colors, names = zip(*shapes.NEW_PAIRS, strict=True)
        assert sorted(names) == sorted(shapes.SHAPES)
        assert max(Counter(colors).values()) <= 2
        assert set(colors) <= set(shapes.COLORS)

    def test_a_tenth_is_held_out(self):
        counts = Counter(scene.split for scene in single_scenes())
        assert counts["val"] / (counts["val"] + counts["train"]) == pytest.approx(0.1, abs=0.01)

    @pytest.mark.parametrize("split", shapes.SPLITS)
    def test_siblings_differ_in_one_attribute_and_stay_in_their_split(self, split):
        dataset = shapes.ShapesDataset(48, split=split, siblings=True)
        assert {dataset.scene(i).split for i in range(400)} == {split}
        found = enumerate(detect(dataset.pixels(range(1, 400, 2))))
        siblings = sum(len(attribute_errors(one, dataset.scene(2 * i))) == 1 for i, one in found)
        assert siblings >= (195 if split == "train" else 150)  # few held-out scenes have no held-out neighbor


class TestCaptions:
    def test_every_wording_is_parsed(self):
        pairs = [scene for scene in sampled_scenes("train") + sampled_scenes("new_pairs") if scene.relation]
        for scene in [*single_scenes()[::7], *pairs]:
            assert all(shapes.parse_caption(caption) == scene for caption in shapes.captions(scene))

    def test_wordings(self):
        above = shapes.Scene(
            "yellow", (shapes.Thing("red", "circle"), shapes.Thing("blue", "square")), relation="above"
        )
        assert shapes.captions(above) == [
            "a red circle above a blue square on a yellow background",
            "a blue square below a red circle on a yellow background",
            "on a yellow background, a red circle above a blue square",
            "a yellow background with a blue square below a red circle",
            "a red circle with a blue square below it on a yellow background",
        ]
        alone = shapes.Scene("white", (shapes.Thing("cyan", "cross"),), place="at the top left", size="small")
        assert shapes.captions(alone) == [
            "a small cyan cross at the top left on a white background",
            "on a white background, a small cyan cross at the top left",
            "a white background with a small cyan cross at the top left",
        ]

    def test_the_wording_is_independent_of_the_changed_attribute(self):
        """Else the wording would give the sibling away to CLIP."""
        dataset, sampled = shapes.ShapesDataset(16, siblings=True), []
        text = SimpleNamespace(encode=lambda caption: sampled.append(caption) or [0])
        CLIPBatch(text, seed=0)(dataset.load([(0, i) for i in range(4000)]))
        counts = np.zeros((2, 5))
        for index in range(1, 4000, 2):
            one, two = dataset.scene(index - 1), dataset.scene(index)
            if one.relation and two.relation:
                changed = int(one.background != two.background)
                counts[changed, shapes.captions(two).index(sampled[index])] += 1
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < 18.5  # 4 degrees of freedom, one in a thousand


class TestBoxes:
    @pytest.mark.parametrize("split", shapes.SPLITS)
    def test_boxes_cover_whole_cells_inside_the_image_and_stay_apart(self, split):
        rng = np.random.default_rng(0)
        for _ in range(1000):
            scene = shapes.sample_scene(rng, split)
            boxes = (shapes.GRID * shapes.sample_boxes(scene, rng)).round(9)[: len(scene.things)]
            low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
            assert (low % 1 == 0).all()
            assert set(boxes[:, 2]) <= {5, 8}
            assert 0 <= low.min() < high.max() <= shapes.GRID
            if scene.relation is not None:
                axis = shapes.RELATIONS.index(scene.relation)
                assert high[0, axis] < low[1, axis]


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("extent", [0.42, 0.67])
@pytest.mark.parametrize("resolution", [48, 96])
def test_coverage_is_the_area_of_the_shape(shape, extent, resolution):
    scene = shapes.Scene("black", (shapes.Thing("white", shape),), place="in the middle", size="small")
    pixels = shapes.render([scene], np.array([[[0.503, 0.496, extent], [0, 0, 0]]]), resolution)[0, 0]
    assert ((pixels * 255 - 25) / 220).mean() == pytest.approx(AREAS[shape] * extent**2, rel=0.01)


@pytest.mark.parametrize("resolution", [16, 48, 96])
def test_every_resolution_shows_the_same_image(resolution):
    pixels, fine = (shapes.ShapesDataset(side).pixels(range(4)) for side in (resolution, 192))
    assert (pixels.dtype, pixels.shape) == (np.float32, (4, 3, resolution, resolution))
    assert 0 <= pixels.min() <= pixels.max() <= 1
    step = 192 // resolution
    averaged = fine.reshape(4, 3, resolution, step, resolution, step).mean((3, 5))
    assert np.abs(averaged - pixels).mean() < 0.01


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: shapes.ShapesDataset(48, split="test"), "unknown split"),
        (lambda: shapes.ShapesDataset(15), "15 is too small"),
        (lambda: shapes.parse_caption("a red circle above a blue square"), "not a caption of the shapes"),
        (lambda: shapes.parse_caption("a small red circle in the middle on a pink background"), "not a"),
        (lambda: shapes.parse_caption("a small red circle in the middle on a blue background "), "not a"),
        (lambda: shapes.parse_caption("a red cross above a red tee above a blue bar"), "not a caption"),
    ],
)
def test_wrong_arguments_are_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
