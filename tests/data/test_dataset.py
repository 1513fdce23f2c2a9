"""Images, captions and tokens by number: dalle/data (order, pairs, tokens)."""

import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data import DataConfig, load_images, open_dataset
from dalle.data.bad_samples import BadSampleError
from dalle.data.dataset import ImageTextDataset
from dalle.data.sampler import batch_indices
from dalle.data.sources import FolderSource

# Order: which samples a step takes.


def epochs(batch_size, size, seed, count):
    """The first `count` samples, step after step."""
    steps = (batch_indices(step, batch_size, size, seed) for step in range(-(-count // batch_size)))
    return list(islice((sample for step in steps for sample in step), count))


@pytest.mark.parametrize("batch_size", [1, 4, 10, 7, 23])
def test_every_epoch_is_a_permutation(batch_size):
    samples = epochs(batch_size, size=10, seed=0, count=50)
    assert [epoch for epoch, _ in samples] == [i // 10 for i in range(50)]
    for epoch in range(5):
        assert sorted(index for _, index in samples[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_epochs_and_seeds_have_permutations_of_their_own():
    orders = {(seed, e): epochs(20, 20, seed, 60)[20 * e : 20 * e + 20] for seed in (0, 1) for e in range(3)}
    assert len({tuple(index for _, index in order) for order in orders.values()}) == 6


def test_a_step_depends_on_its_number_and_the_seed_alone():
    forwards = [list(batch_indices(step, 6, 10, 3)) for step in range(8)]
    backwards = [list(batch_indices(step, 6, 10, 3)) for step in reversed(range(8))][::-1]
    assert forwards == backwards


def test_the_order_does_not_depend_on_the_batch_size():
    assert epochs(4, 10, 0, 40) == epochs(8, 10, 0, 40)


def test_a_batch_may_span_epochs():
    assert [epoch for epoch, _ in batch_indices(0, 7, 3, 0)] == [0, 0, 0, 1, 1, 1, 2]


def test_an_endless_set_is_read_once_in_its_own_order():
    assert list(batch_indices(3, 4, None, seed=5)) == [(0, 12), (0, 13), (0, 14), (0, 15)]


# Folders of images.


def add_pair(folder, name, captions="a caption\n", level=0, size=(24, 20)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    if captions is not None:
        path.with_suffix(".txt").write_text(captions, encoding="utf-8")
    return path


def folder_pairs(folder, split="train", resolution=16, val_fraction=0.05):
    return ImageTextDataset(FolderSource(folder), resolution, split, val_fraction)


def pixels_of(pairs, indices, augment="none", seed=0):
    return pairs.load([(0, index) for index in indices], augment, seed).pixels


def causes(pairs, index=0, augment="none"):
    """(cause, detail) of a sample that must not be usable."""
    batch = pairs.load([(0, index)], augment)
    assert (batch.samples, batch.captions, len(batch.pixels)) == ([], [], 0)
    return [(skip.index, skip.name, skip.cause, skip.detail) for skip in batch.skipped]


@pytest.fixture
def folder(tmp_path):
    """Forty pairs, in two folders with the same stems."""
    for i in range(20):
        add_pair(tmp_path, f"cats/{i:02d}.png", f"cat {i}", level=i)
        add_pair(tmp_path, f"dogs/{i:02d}.jpg", f"dog {i}", level=100 + i)
    return tmp_path


def names(pairs, folder):
    return [pairs.name(index) for index in range(pairs.size)]


def test_captions_are_the_lines_of_the_file_beside_the_image(tmp_path):
    add_pair(tmp_path, "a.png", "one dog\n\n  two dogs \r\nö\n")
    pairs = folder_pairs(tmp_path, val_fraction=1e-9)
    assert pairs.size == 1
    assert pairs.captions([0]) == [["one dog", "two dogs", "ö"]]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    add_pair(tmp_path, "a.png", "\ufeffone dog")
    assert folder_pairs(tmp_path, val_fraction=1e-9).captions([0]) == [["one dog"]]


def test_equal_stems_in_two_folders_have_their_own_captions(folder):
    pairs = folder_pairs(folder)
    for name, (caption,) in zip(names(pairs, folder), pairs.captions(range(pairs.size)), strict=True):
        kind, file = name.split("/")
        assert caption == f"{kind[:-1]} {int(file[:2])}"


def test_pixels_are_those_of_the_numbered_images(folder):
    pairs = folder_pairs(folder)
    pixels = pixels_of(pairs, [3, 0, 3])
    assert (pixels.shape, pixels.dtype) == ((3, 3, 16, 16), np.float32)
    for row, index in enumerate([3, 0, 3]):
        name = names(pairs, folder)[index]
        level = int(name.split("/")[1][:2]) + (100 if name.startswith("dogs") else 0)
        assert pixels[row] == pytest.approx(level / 255)


def test_other_files_are_left_alone(folder):
    before = folder_pairs(folder).size
    (folder / "notes.txt").write_text("no image")
    (folder / "list.csv").write_text("no image")
    assert folder_pairs(folder).size == before


def test_the_splits_are_disjoint_and_together_everything(folder):
    train, held_out = (
        names(folder_pairs(folder, split, val_fraction=0.3), folder) for split in ("train", "held_out")
    )
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 40
    assert 4 <= len(held_out) <= 20


def test_a_image_keeps_its_split_whatever_lies_beside_it(folder, tmp_path_factory):
    held_out = names(folder_pairs(folder, "held_out", val_fraction=0.3), folder)
    elsewhere = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(folder, elsewhere)
    for i in range(20):
        add_pair(elsewhere, f"birds/{i}.png")
    for name in names(folder_pairs(folder), folder)[::2]:
        (elsewhere / name).unlink()
    left = [name for name in held_out if (elsewhere / name).exists()]
    again = names(folder_pairs(elsewhere, "held_out", val_fraction=0.3), elsewhere)
    assert [name for name in again if not name.startswith("birds")] == left


def test_a_larger_share_holds_out_more_and_keeps_what_was_held_out(folder):
    few, many = (
        set(names(folder_pairs(folder, "held_out", val_fraction=share), folder)) for share in (0.2, 0.5)
    )
    assert few < many


def test_images_without_captions_are_counted(folder):
    for i in range(3):
        add_pair(folder, f"birds/{i}.png", captions=None)
    pairs = folder_pairs(folder)
    assert [(skip.name, skip.cause) for skip in pairs.skipped] == [
        (f"birds/{i}.png", "missing twin") for i in range(3)
    ]
    assert not any(name.startswith("birds") for name in names(pairs, folder))


def test_no_captions_at_all_is_refused(tmp_path):
    add_pair(tmp_path, "a.png", captions=None)
    with pytest.raises(ValueError, match=r"has 1 images \(.png, .* none with a .txt of the same name"):
        folder_pairs(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere; expected images with a .txt"):
        folder_pairs(tmp_path / "nowhere")


def test_an_empty_split_is_refused(tmp_path):
    add_pair(tmp_path, "a.png")
    with pytest.raises(
        ValueError, match=r"none of 1 samples falls into split 'held_out'; raise --data.val-fraction"
    ):
        folder_pairs(tmp_path, "held_out", val_fraction=1e-9)


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="unknown split 'new_pairs'; expected train or held_out"):
        open_dataset(DataConfig(str(folder)), "new_pairs")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_caption_file_is_named(tmp_path, text):
    add_pair(tmp_path, "a.png", text)
    assert causes(folder_pairs(tmp_path, val_fraction=1e-9)) == [(0, "a.png", "empty caption", "")]


def test_captions_that_are_not_utf8_are_named(tmp_path):
    add_pair(tmp_path, "a.png").with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    pairs = folder_pairs(tmp_path, val_fraction=1e-9)
    [(_, name, cause, _)] = causes(pairs)
    assert (name, cause) == ("a.txt", "caption not UTF-8")
    assert pairs.captions([0]) == [[]]
    with pytest.raises(BadSampleError, match=r"a\.txt: caption not UTF-8"):
        pairs.source.read(0)


def test_a_broken_image_is_named(tmp_path):
    add_pair(tmp_path, "a.png").write_bytes(b"no image")
    [(index, name, cause, _)] = causes(folder_pairs(tmp_path, val_fraction=1e-9))
    assert (index, name, cause) == (0, "a.png", "wrong type")


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_image_too_small_to_crop_is_named(tmp_path, augment):
    add_pair(tmp_path, "tiny.png", size=(30, 15))
    pairs = folder_pairs(tmp_path, val_fraction=1e-9)
    detail = "image of 30 x 15 is smaller than the 16 x 16 asked for"
    assert causes(pairs, augment=augment) == [(0, "tiny.png", "too small", detail)]
    assert pixels_of(pairs, [0]).shape == (1, 3, 16, 16)  # without augmentation it is enlarged


def noisy_pairs(folder):
    for i in range(3):
        path = add_pair(folder, f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return folder_pairs(folder, val_fraction=1e-9)


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_crop_depends_on_seed_and_index_alone(tmp_path, augment):
    pairs = noisy_pairs(tmp_path)
    both = pixels_of(pairs, [0, 2], augment, seed=1)
    assert (both[1] == pixels_of(pairs, [2], augment, seed=1)[0]).all()
    assert (both[0] != pixels_of(pairs, [0], augment, seed=2)[0]).any()


def test_a_sample_is_cropped_anew_each_epoch(tmp_path):
    pairs = noisy_pairs(tmp_path)
    samples = [(0, 1), (1, 1), (0, 2), (1, 1)]
    pixels = load_images(pairs, samples, "transformer", seed=7)
    assert (pixels.shape, pixels.dtype) == ((4, 3, 16, 16), torch.float32)
    assert not torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[1], pixels[3])
    assert torch.equal(pixels[[2]], load_images(pairs, [(0, 2)], "transformer", seed=7))
    assert not torch.equal(pixels[[2]], load_images(pairs, [(0, 2)], "transformer", seed=8))


def test_open_pairs_opens_a_folder_or_the_shapes(folder):
    config = DataConfig(str(folder), resolution=16, val_fraction=0.3)
    assert names(open_dataset(config, "held_out"), folder) == names(
        folder_pairs(folder, "held_out", val_fraction=0.3), folder
    )
    shapes = open_dataset(DataConfig("shapes", resolution=32))
    assert shapes.size is None
    assert load_images(shapes, [(0, 5)], "none", seed=0).shape == (1, 3, 32, 32)


def test_no_data_says_what_to_give():
    with pytest.raises(ValueError, match=r"no data: give --data\.path FOLDER, or --data\.path shapes"):
        open_dataset(DataConfig())


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_held_out_share_must_leave_something(share):
    with pytest.raises(ValueError, match="val_fraction must lie between 0 and 1"):
        DataConfig(val_fraction=share)


def test_images_that_cannot_be_used_are_left_out_and_named(tmp_path):
    for name, side in (("a", 40), ("b", 12)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a caption")
    batch = folder_pairs(tmp_path, resolution=32, val_fraction=1e-9).load([(0, 0), (0, 1), (0, 2)], "dvae")
    assert batch.samples == [(0, 0)]
    assert [(skip.name, skip.cause) for skip in batch.skipped] == [
        ("b.png", "too small"),
        ("c.png", "wrong type"),
    ]


def test_another_set_of_images_has_another_hash(folder):
    before = folder_pairs(folder).hash
    assert folder_pairs(folder).hash == before
    Image.new("RGB", (40, 40)).save(folder / "zz.png")
    (folder / "zz.txt").write_text("one more")
    assert folder_pairs(folder, val_fraction=1e-9).hash != before
