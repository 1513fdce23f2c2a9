"""Token cache, its reader and writer: dalle/data/token_cache.py."""

import json
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle.data import TokenCache
from dalle.data.token_cache import TokenCacheSpec, TokenWriter, shard_name

SPEC = TokenCacheSpec(dvae="abc", data="def", grid=(2, 3), vocab=65536, images=11, crops=2, shard=4)
TOKENS = np.random.default_rng(0).integers(65536, size=(11, 2, 6))
TOKENS[0, 0, :2] = 0, 65535
CAPTIONS = [["one"], ["two", "zwö\u2028 \x85 \x1c \n ü"], ["红色的圆"]]
CAPTIONS += [[f"image {n}", "سماء"] for n in range(3, 11)]


def write(folder, spec=SPEC, part=0, parts=1, shards=None, left_out=()):
    writer = TokenWriter(folder, spec, part, parts)
    for shard in writer.missing() if shards is None else shards:
        numbers = [n for n in spec.numbers(shard) if n not in left_out]
        writer.write(shard, TOKENS[numbers], [CAPTIONS[n] for n in numbers])
    return writer.finish()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tokens_of_each_crop_and_captions_round_trip(tmp_path):
    cache = write(tmp_path / "tokens")
    assert (cache.size, cache.crops, cache.grid) == (11, 2, (2, 3))
    tokens = cache.image_tokens([10, 0, 0, 4], [1, 0, 1, 0])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [TOKENS[n, crop].tolist() for n, crop in ((10, 1), (0, 0), (0, 1), (4, 0))]
    assert torch.equal(cache.image_tokens([3]), torch.from_numpy(TOKENS[3, :1]))
    assert cache.captions(range(11)) == CAPTIONS
    assert pickle.loads(pickle.dumps(cache)).captions([2, 1]) == [CAPTIONS[2], CAPTIONS[1]]
    for image in (-1, 11):
        with pytest.raises(IndexError, match=rf"0 \.\. 10, not {image}"):
            cache.image_tokens([image])


@pytest.mark.parametrize("left_out", [(5,), (0, 3, 10), (4, 5, 6, 7), (0, 1, 2, 3, 8, 9, 10)])
def test_images_left_out_leave_no_gap(tmp_path, left_out):
    cache = write(tmp_path / "tokens", left_out=left_out)
    kept = [n for n in range(11) if n not in left_out]
    assert (cache.size, cache.meta["left_out"]) == (len(kept), len(left_out))
    assert cache.captions(range(cache.size)) == [CAPTIONS[n] for n in kept]
    assert torch.equal(cache.image_tokens(range(cache.size)), torch.from_numpy(TOKENS[kept, 0]))


def test_memory_does_not_grow_with_the_images(tmp_path):
    writer = TokenWriter(tmp_path, replace(SPEC, images=20_000, crops=1, shard=1000))
    for shard in writer.missing():
        captions = [[f"a caption of some length, {n}"] for n in writer.spec.numbers(shard)]
        writer.write(shard, np.zeros((1000, 1, 6), np.uint16), captions)
    writer.finish()
    tracemalloc.start()
    cache = TokenCache(tmp_path)
    for n in range(0, 20_000, 400):
        assert cache.captions([n]) == [[f"a caption of some length, {n}"]]
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 150_000  # the captions take 1.6 million


def test_parts_write_the_cache_of_one_process(tmp_path):
    parts = [TokenWriter(tmp_path / "shards", SPEC, part, 4).missing() for part in range(4)]
    assert parts == [[0], [1], [2], []]
    single = write(tmp_path / "single")
    assert write(tmp_path / "shared", part=1, parts=2) is None
    with pytest.raises(ValueError, match=r"incomplete.*1 shards"):
        TokenCache(tmp_path / "shared")
    assert write(tmp_path / "shared", part=0, parts=2).hash == single.hash
    assert contents(tmp_path / "shared") == contents(tmp_path / "single")
    assert TokenWriter(tmp_path / "shared", SPEC, 1, 2).finish().size == 11


def test_an_interrupted_writer_resumes_at_its_shard(tmp_path):
    (tmp_path / "tokens").mkdir()
    write(tmp_path / "tokens", shards=[0])
    (tmp_path / "tokens" / f".partial-0-{shard_name(1)}").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"000001.*No space left on device.* complete shards are kept"):
        write(tmp_path / "tokens")
    assert TokenWriter(tmp_path / "tokens", SPEC).missing() == [1, 2]
    write(tmp_path / "tokens")
    write(tmp_path / "other")
    complete = contents(tmp_path / "tokens")
    assert complete == contents(tmp_path / "other")
    write(tmp_path / "tokens")  # complete: nothing changes
    assert contents(tmp_path / "tokens") == complete


@pytest.mark.parametrize(
    "change", [{"dvae": "xyz"}, {"data": "xyz"}, {"crops": 1}, {"transform": {"seed": 1}}]
)
def test_another_spec_is_refused_with_both_keys(tmp_path, change):
    write(tmp_path / "tokens", shards=[0])
    before = contents(tmp_path / "tokens")
    other = replace(SPEC, **change)
    with pytest.raises(ValueError, match=f"{SPEC.key}.*{other.key}.*{next(iter(change))} was"):
        TokenWriter(tmp_path / "tokens", other)
    assert contents(tmp_path / "tokens") == before


def test_a_shard_of_another_cache_is_refused_with_both_keys(tmp_path):
    other = replace(SPEC, dvae="xyz")
    write(tmp_path / "other", other)
    cache = write(tmp_path / "tokens")
    foreign = (tmp_path / "other" / shard_name(2)).read_bytes()
    (tmp_path / "tokens" / shard_name(2)).write_bytes(foreign)
    with pytest.raises(ValueError, match=f"000002.*{other.key}, expected {SPEC.key}"):
        cache.captions([9])
    (tmp_path / "tokens" / "meta.json").unlink()
    with pytest.raises(ValueError, match=f"000002.*{other.key}, expected {SPEC.key}"):
        write(tmp_path / "tokens")


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="no token cache"):
            write(place)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="65537 is too large"):
        replace(SPEC, vocab=65537)
    with pytest.raises(ValueError, match="would be empty"):
        write(tmp_path / "tokens", left_out=range(11))
    for part in (-1, 2):
        with pytest.raises(ValueError, match=rf"0 \.\. 1 for 2 parts, got {part}"):
            TokenWriter(tmp_path / "tokens", SPEC, part, 2)


@pytest.mark.parametrize("fraction", [0, 0.3, 0.97])
@pytest.mark.parametrize("name", [shard_name(2), "meta.json"])
def test_a_truncated_file_is_refused_and_can_be_repaired(tmp_path, name, fraction):
    cache = write(tmp_path / "tokens")
    content = (tmp_path / "tokens" / name).read_bytes()
    (tmp_path / "tokens" / name).write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match=r"tokens.*(not a token cache|damaged)"):
        TokenCache(tmp_path / "tokens")
    for found in (tmp_path / "tokens" / name, tmp_path / "tokens" / "meta.json"):
        found.unlink(missing_ok=True)
    (tmp_path / "tokens" / shard_name(1)).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"shard-000001.* is damaged"):
        write(tmp_path / "tokens")
    (tmp_path / "tokens" / shard_name(1)).unlink()
    assert write(tmp_path / "tokens").hash == cache.hash


def test_a_flipped_bit_is_refused(tmp_path):
    write(tmp_path)
    file = tmp_path / shard_name(1)
    content = file.read_bytes()
    for place in range(0, len(content), 5):
        changed = content[place] ^ (1 << place % 8)
        file.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"shard-000001.*encode_images again"):
            TokenCache(tmp_path).image_tokens([5])


def test_shards_that_change_places_are_refused(tmp_path):
    writer = TokenWriter(tmp_path, replace(SPEC, images=8))
    for shard in (0, 1):
        writer.write(shard, TOKENS[4 * shard :][:4], [["of one size"]] * 4)
    writer.finish()
    first, second = (tmp_path / shard_name(shard) for shard in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000000.* is not the shard"):
        TokenCache(tmp_path).image_tokens([0])


CHANGES = [("grid", [2, 4]), ("grid", "x"), ("crops", 1), ("images", 2**70), ("left_out", 1)]
CHANGES += [("shards", [{"images": 2**70, "bytes": 1}])]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_numbers_of_meta_json_that_contradict_each_other_are_refused(tmp_path, name, value):
    meta = write(tmp_path).meta | {name: value}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json is damaged|not a token cache"):
        TokenCache(tmp_path)
    (tmp_path / "meta.json").unlink()
    assert write(tmp_path).captions(range(11)) == CAPTIONS


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        (None, "make one with"),
        ([], "not a token cache"),
        ({"kind": "tokens", "format": 1}, "not a token cache"),
        ({"kind": "tokens", "format": 1, "shards": [3]}, "not a token cache"),
        ({"kind": "tokens", "format": 2}, "format 2, this version reads 1"),
        ({"kind": "dvae"}, "holds 'dvae'"),
    ],
)
def test_a_folder_with_other_metadata_is_refused(tmp_path, meta, words):
    if meta is not None:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=words):
        TokenCache(tmp_path)
