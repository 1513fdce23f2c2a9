"""Pictures, captions and tokens by number: dalle/data (order, pairs, tokens)."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data import PairsConfig, TokenCache, open_pairs, pixels_of_samples
from dalle.data.order import samples_of_step
from dalle.data.pairs import FolderPairs
from dalle.data.tokens import write_tokens

# Order: which samples a step takes.


def epochs(batch_size, size, seed, count):
    """The first `count` samples, step after step."""
    steps = (samples_of_step(step, batch_size, size, seed) for step in range(-(-count // batch_size)))
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
    forwards = [list(samples_of_step(step, 6, 10, 3)) for step in range(8)]
    backwards = [list(samples_of_step(step, 6, 10, 3)) for step in reversed(range(8))][::-1]
    assert forwards == backwards


def test_the_order_does_not_depend_on_the_batch_size():
    assert epochs(4, 10, 0, 40) == epochs(8, 10, 0, 40)


def test_a_batch_may_span_epochs():
    assert [epoch for epoch, _ in samples_of_step(0, 7, 3, 0)] == [0, 0, 0, 1, 1, 1, 2]


def test_an_endless_set_is_read_once_in_its_own_order():
    assert list(samples_of_step(3, 4, None, seed=5)) == [(0, 12), (0, 13), (0, 14), (0, 15)]


# Folders of pictures.


def add_pair(folder, name, captions="a caption\n", level=0, size=(24, 20)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    if captions is not None:
        path.with_suffix(".txt").write_text(captions, encoding="utf-8")
    return path


def folder_pairs(folder, split="train", resolution=16, held_out=0.05):
    return FolderPairs(folder, resolution, split, held_out)


@pytest.fixture
def folder(tmp_path):
    """Forty pairs, in two folders with the same stems."""
    for i in range(20):
        add_pair(tmp_path, f"cats/{i:02d}.png", f"cat {i}", level=i)
        add_pair(tmp_path, f"dogs/{i:02d}.jpg", f"dog {i}", level=100 + i)
    return tmp_path


def names(pairs, folder):
    return [path.relative_to(folder).as_posix() for path in pairs.paths]


def test_captions_are_the_lines_of_the_file_beside_the_picture(tmp_path):
    add_pair(tmp_path, "a.png", "one dog\n\n  two dogs \r\nö\n")
    pairs = folder_pairs(tmp_path, held_out=1e-9)
    assert pairs.size == 1
    assert pairs.captions([0]) == [["one dog", "two dogs", "ö"]]


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path):
    add_pair(tmp_path, "a.png", "\ufeffone dog")
    assert folder_pairs(tmp_path, held_out=1e-9).captions([0]) == [["one dog"]]


def test_equal_stems_in_two_folders_have_their_own_captions(folder):
    pairs = folder_pairs(folder)
    for name, (caption,) in zip(names(pairs, folder), pairs.captions(range(pairs.size)), strict=True):
        kind, file = name.split("/")
        assert caption == f"{kind[:-1]} {int(file[:2])}"


def test_pixels_are_those_of_the_numbered_pictures(folder):
    pairs = folder_pairs(folder)
    pixels = pairs.pixels([3, 0, 3])
    assert (pixels.shape, pixels.dtype) == ((3, 3, 16, 16), np.float32)
    for row, index in enumerate([3, 0, 3]):
        name = names(pairs, folder)[index]
        level = int(name.split("/")[1][:2]) + (100 if name.startswith("dogs") else 0)
        assert pixels[row] == pytest.approx(level / 255)


def test_other_files_are_left_alone(folder):
    before = folder_pairs(folder).size
    (folder / "notes.txt").write_text("no picture")
    (folder / "list.csv").write_text("no picture")
    assert folder_pairs(folder).size == before


def test_the_splits_are_disjoint_and_together_everything(folder):
    train, held_out = (names(folder_pairs(folder, split, held_out=0.3), folder) for split in ("train", "held_out"))
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 40
    assert 4 <= len(held_out) <= 20


def test_a_picture_keeps_its_split_whatever_lies_beside_it(folder, tmp_path_factory):
    held_out = names(folder_pairs(folder, "held_out", held_out=0.3), folder)
    elsewhere = tmp_path_factory.mktemp("moved") / "set"
    shutil.copytree(folder, elsewhere)
    for i in range(20):
        add_pair(elsewhere, f"birds/{i}.png")
    for name in names(folder_pairs(folder), folder)[::2]:
        (elsewhere / name).unlink()
    left = [name for name in held_out if (elsewhere / name).exists()]
    again = names(folder_pairs(elsewhere, "held_out", held_out=0.3), elsewhere)
    assert [name for name in again if not name.startswith("birds")] == left


def test_a_larger_share_holds_out_more_and_keeps_what_was_held_out(folder):
    few, many = (set(names(folder_pairs(folder, "held_out", held_out=share), folder)) for share in (0.2, 0.5))
    assert few < many


def test_pictures_without_captions_are_counted(folder):
    for i in range(3):
        add_pair(folder, f"birds/{i}.png", captions=None)
    pairs = folder_pairs(folder)
    assert pairs.without_caption == 3
    assert not any(name.startswith("birds") for name in names(pairs, folder))


def test_no_captions_at_all_is_refused(tmp_path):
    add_pair(tmp_path, "a.png", captions=None)
    with pytest.raises(ValueError, match=r"has 1 pictures \(.png, .* none with a .txt of the same name"):
        folder_pairs(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere; expected pictures with a .txt"):
        folder_pairs(tmp_path / "nowhere")


def test_an_empty_split_is_refused(tmp_path):
    add_pair(tmp_path, "a.png")
    with pytest.raises(ValueError, match=r"none of 1 pairs falls into split 'held_out'; raise --data\.held-out"):
        folder_pairs(tmp_path, "held_out", held_out=1e-9)


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="unknown split 'new_pairs'; expected train or held_out"):
        folder_pairs(folder, "new_pairs")


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_caption_file_is_named(tmp_path, text):
    add_pair(tmp_path, "a.png", text)
    with pytest.raises(ValueError, match=r"a\.txt holds no caption; write one a line or remove the file"):
        folder_pairs(tmp_path, held_out=1e-9)


def test_captions_that_are_not_utf8_are_named(tmp_path):
    add_pair(tmp_path, "a.png").with_suffix(".txt").write_bytes("schön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        folder_pairs(tmp_path, held_out=1e-9)


def test_a_broken_picture_is_named(tmp_path):
    add_pair(tmp_path, "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png.*as a picture"):
        folder_pairs(tmp_path, held_out=1e-9).pixels([0])


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_picture_too_small_to_crop_is_named(tmp_path, augment):
    add_pair(tmp_path, "tiny.png", size=(30, 15))
    pairs = folder_pairs(tmp_path, held_out=1e-9)
    with pytest.raises(ValueError, match=r"tiny\.png: picture of 30 x 15 is smaller than the 16 x 16 asked for"):
        pairs.pixels([0], augment)
    assert pairs.pixels([0]).shape == (1, 3, 16, 16)  # without augmentation it is enlarged


def noisy_pairs(folder):
    for i in range(3):
        path = add_pair(folder, f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return folder_pairs(folder, held_out=1e-9)


@pytest.mark.parametrize("augment", ["dvae", "transformer"])
def test_a_crop_depends_on_seed_and_index_alone(tmp_path, augment):
    pairs = noisy_pairs(tmp_path)
    both = pairs.pixels([0, 2], augment, seed=1)
    assert (both[1] == pairs.pixels([2], augment, seed=1)[0]).all()
    assert (both[0] != pairs.pixels([0], augment, seed=2)[0]).any()


def test_a_sample_is_cropped_anew_each_epoch(tmp_path):
    pairs = noisy_pairs(tmp_path)
    samples = [(0, 1), (1, 1), (0, 2), (1, 1)]
    pixels = pixels_of_samples(pairs, samples, "transformer", seed=7)
    assert (pixels.shape, pixels.dtype) == ((4, 3, 16, 16), torch.float32)
    assert not torch.equal(pixels[0], pixels[1])
    assert torch.equal(pixels[1], pixels[3])
    assert torch.equal(pixels[[2]], pixels_of_samples(pairs, [(0, 2)], "transformer", seed=7))
    assert not torch.equal(pixels[[2]], pixels_of_samples(pairs, [(0, 2)], "transformer", seed=8))


def test_open_pairs_opens_a_folder_or_the_shapes(folder):
    config = PairsConfig(str(folder), resolution=16, held_out=0.3)
    assert names(open_pairs(config, "held_out"), folder) == names(
        folder_pairs(folder, "held_out", held_out=0.3), folder
    )
    shapes = open_pairs(PairsConfig("shapes", resolution=32))
    assert shapes.size is None
    assert pixels_of_samples(shapes, [(0, 5)], "none", seed=0).shape == (1, 3, 32, 32)


def test_no_data_says_what_to_give():
    with pytest.raises(ValueError, match=r"no data: give --data\.path FOLDER, or --data\.path shapes"):
        open_pairs(PairsConfig())


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_a_held_out_share_must_leave_something(share):
    with pytest.raises(ValueError, match="held_out must lie between 0 and 1"):
        PairsConfig(held_out=share)


# The token cache.

META = {"grid": [2, 3], "vocab": 65536, "dvae": "abc", "data": {"path": "shapes"}}
CAPTIONS = [["one"], ["two", "zwö\u2028 \x85 \x1c \n ü"], [], ["four"], ["five"]]
TOKENS = torch.randint(65536, (5, 6), generator=torch.Generator().manual_seed(0))
TOKENS[0, :2] = torch.tensor([0, 65535])


def write(folder, meta=META, batch_size=2):
    def encode(numbers):
        return TOKENS[numbers], [CAPTIONS[i] for i in numbers]

    batches = iter([list(range(5))[i : i + batch_size] for i in range(0, 5, batch_size)])
    return write_tokens(folder, encode, batches, 5, meta)


def test_tokens_and_captions_come_back(tmp_path):
    write(tmp_path / "tokens")
    cache = TokenCache(tmp_path / "tokens")
    assert cache.size == 5
    assert cache.captions == CAPTIONS
    assert cache.meta == {"kind": "tokens", "count": 5, **META}
    tokens = cache.image_tokens([4, 0, 0])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, TOKENS[[4, 0, 0]])


def test_the_cache_does_not_depend_on_the_batch_size(tmp_path):
    for batch_size in (1, 5):
        write(tmp_path / str(batch_size), batch_size=batch_size)
    for name in ("tokens.npy", "captions.jsonl", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "5" / name).read_bytes()


def test_a_cache_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path):
    write(tmp_path / "tokens", {**META, "dvae": "old"})
    (tmp_path / "tokens" / "leftover").touch()
    assert write(tmp_path / "tokens").meta["dvae"] == "abc"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["captions.jsonl", "meta.json", "tokens", "tokens.npy"]


def test_a_write_that_breaks_off_leaves_the_old_cache(tmp_path):
    write(tmp_path / "tokens")

    def encode(numbers):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_tokens(tmp_path / "tokens", encode, iter([[0]]), 5, META)
    assert torch.equal(TokenCache(tmp_path / "tokens").image_tokens(list(range(5))), TOKENS)
    assert write(tmp_path / "tokens").size == 5  # the leftovers are no obstacle


def test_a_folder_with_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no token cache; its contents would be lost"):
        write(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(ValueError, match="is no token cache"):
        write(tmp_path / "thesis.txt")


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "tokens").mkdir()
    assert write(tmp_path / "tokens").size == 5


def test_a_vocabulary_beyond_16_bits_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16-bit codes; the vocabulary of 65537 is too large"):
        write(tmp_path / "tokens", {**META, "vocab": 65537})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is not a token cache .* make one with scripts/encode_images\.py"):
        TokenCache(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["tokens.npy", "captions.jsonl", "meta.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / name).unlink()
    with pytest.raises(ValueError, match=f"is not a token cache .*{name}"):
        TokenCache(tmp_path / "tokens")


@pytest.mark.parametrize("share", [0, 0.3, 0.8, 0.97])
@pytest.mark.parametrize("name", ["tokens.npy", "captions.jsonl", "meta.json"])
def test_a_file_that_breaks_off_is_refused(tmp_path, name, share):
    write(tmp_path / "tokens")
    content = (tmp_path / "tokens" / name).read_bytes()
    (tmp_path / "tokens" / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"tokens.*(is not a token cache|the cache is damaged)"):
        TokenCache(tmp_path / "tokens")


@pytest.mark.parametrize(
    "meta", [[], {"kind": "tokens"}, {"kind": "tokens", "grid": 3}, {"kind": "tokens", "grid": [2]}]
)
def test_meta_data_of_another_shape_are_refused(tmp_path, meta):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="tokens is not a token cache"):
        TokenCache(tmp_path / "tokens")


def test_another_kind_of_folder_is_refused(tmp_path):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps({**META, "kind": "dvae"}))
    with pytest.raises(ValueError, match="holds 'dvae', expected a token cache"):
        TokenCache(tmp_path / "tokens")


def test_a_grid_that_does_not_match_the_tokens_is_refused(tmp_path):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps({**META, "kind": "tokens", "grid": [3, 3]}))
    with pytest.raises(ValueError, match=r"tokens are \(5, 6\), expected \(5, 9\) .* the cache is damaged"):
        TokenCache(tmp_path / "tokens")


def test_tokens_that_would_run_code_are_refused(tmp_path):
    write(tmp_path / "tokens")
    np.save(tmp_path / "tokens" / "tokens.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="is not a token cache"):
        TokenCache(tmp_path / "tokens")


def test_pictures_that_cannot_be_used_are_named_before_work_begins(tmp_path):
    for name, side in (("a", 40), ("b", 12)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not a picture")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a caption")
    with pytest.raises(ValueError, match=r"2 of 3 .*b\.png \(12 x 12 is smaller than 32\), .*c\.png \(not a picture\)"):
        FolderPairs(tmp_path, 32, "train", 1e-9, smallest=32)
    assert FolderPairs(tmp_path, 32, "train", 1e-9).size == 3


def test_another_set_of_pictures_has_another_hash(folder):
    before = folder_pairs(folder).hash
    assert folder_pairs(folder).hash == before
    Image.new("RGB", (40, 40)).save(folder / "zz.png")
    (folder / "zz.txt").write_text("one more")
    assert folder_pairs(folder, held_out=1e-9).hash != before
