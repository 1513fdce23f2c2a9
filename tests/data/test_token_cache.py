"""The token cache: dalle/data/token_cache.py, dalle/commands/encode_images.py."""

import json
import os
import pickle
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_dvae import EncodeConfig, train_dvae
from dalle.commands.train_transformer import train_transformer
from dalle.data import TokenCache
from dalle.data.token_cache import TokenCacheSpec, TokenWriter, shard_name
from dalle.runs import encoding
from dalle.runs.encoding import Encoder, resolve_part
from dalle.types import BadSample, ImageTextBatch, ImageTokenizer

PLAN = TokenCacheSpec(dvae="abc", data="def", grid=(2, 3), vocab=65536, images=11, crops=2, shard=4)
TOKENS = np.random.default_rng(0).integers(65536, size=(11, 2, 6))
TOKENS[0, 0, :2] = 0, 65535
CAPTIONS = [
    ["one"],
    ["two", "zwö\u2028 \x85 \x1c \n ü"],
    ["红色的圆"],
    *[[f"image {n}", "سماء"] for n in range(3, 11)],
]


def write(folder, plan=PLAN, part=0, parts=1, shards=None, left_out=()):
    writer = TokenWriter(folder, plan, part, parts)
    for shard in writer.missing() if shards is None else shards:
        numbers = [n for n in plan.numbers(shard) if n not in left_out]
        writer.write(shard, TOKENS[numbers], numbers, [CAPTIONS[n] for n in numbers])
    return writer.finish()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Reading.


def test_tokens_of_each_crop_and_captions_come_back(tmp_path):
    cache = write(tmp_path / "tokens")
    assert (cache.size, cache.crops, cache.grid) == (11, 2, (2, 3))
    tokens = cache.image_tokens([10, 0, 0, 4], [1, 0, 1, 0])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [
        TOKENS[10, 1].tolist(),
        TOKENS[0, 0].tolist(),
        TOKENS[0, 1].tolist(),
        TOKENS[4, 0].tolist(),
    ]
    assert torch.equal(cache.image_tokens([3]), torch.from_numpy(TOKENS[3, :1]))
    assert cache.captions(range(11)) == CAPTIONS
    assert cache.captions([2, 1]) == [CAPTIONS[2], CAPTIONS[1]]


@pytest.mark.parametrize("left_out", [(5,), (0, 3, 10), (4, 5, 6, 7), (0, 1, 2, 3, 8, 9, 10)])
def test_images_left_out_close_up_also_when_a_shard_is_empty(tmp_path, left_out):
    cache = write(tmp_path / "tokens", left_out=left_out)
    kept = [n for n in range(11) if n not in left_out]
    assert (cache.size, cache.meta["left_out"]) == (len(kept), len(left_out))
    assert [cache.number(i) for i in range(cache.size)] == kept
    assert cache.captions(range(cache.size)) == [CAPTIONS[n] for n in kept]
    assert torch.equal(cache.image_tokens(range(cache.size)), torch.from_numpy(TOKENS[kept, 0]))


@pytest.mark.parametrize("image", [-1, 11])
def test_a_image_out_of_range_is_named(tmp_path, image):
    with pytest.raises(IndexError, match=rf"images 0 \.\. 10, not {image}"):
        write(tmp_path / "tokens").image_tokens([image])


def test_a_cache_goes_to_another_process(tmp_path):
    copy = pickle.loads(pickle.dumps(write(tmp_path / "tokens")))
    assert copy.captions([7]) == [CAPTIONS[7]]


def test_memory_does_not_grow_with_the_images(tmp_path):
    """A cache of 200 times the images opens and reads in the same memory, less than its captions take."""

    def peak(images):
        plan = replace(PLAN, images=images, crops=1, shard=1000)
        writer = TokenWriter(tmp_path / str(images), plan)
        for shard in writer.missing():
            numbers = plan.numbers(shard)
            tokens = np.zeros((len(numbers), 1, 6), np.uint16)
            writer.write(shard, tokens, numbers, [[f"a caption of some length, {n}"] for n in numbers])
        writer.finish()
        tracemalloc.start()
        cache = TokenCache(tmp_path / str(images))
        for n in range(0, images, max(1, images // 50)):
            assert cache.captions([n]) == [[f"a caption of some length, {n}"]]
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(100), peak(20_000)
    assert large < small + 100_000  # of each shard a little; the captions take 1.6 million


# Writing.


def test_the_parts_are_one_cache_and_the_same_as_one_process_writes(tmp_path):
    whole = write(tmp_path / "whole")
    assert write(tmp_path / "shared", part=1, parts=2) is None
    with pytest.raises(
        ValueError, match="shared is not whole: 1 of 3 shards are there; give the same command"
    ):
        TokenCache(tmp_path / "shared")
    assert write(tmp_path / "shared", part=0, parts=2).hash == whole.hash
    assert contents(tmp_path / "shared") == contents(tmp_path / "whole")
    assert TokenWriter(tmp_path / "shared", PLAN, 1, 2).finish().size == 11


def test_each_shard_has_one_part(tmp_path):
    parts = [TokenWriter(tmp_path / "tokens", PLAN, part, 4).missing() for part in range(4)]
    assert parts == [[0], [1], [2], []]


def test_a_stopped_writing_goes_on_at_the_shard_it_stopped_in(tmp_path, monkeypatch):
    write(tmp_path / "tokens", shards=[0])
    writer = TokenWriter(tmp_path / "tokens", PLAN)
    assert writer.missing() == [1, 2]

    def fail(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write(tmp_path / "tokens")
    assert TokenWriter(tmp_path / "tokens", PLAN).missing() == [1, 2]
    write(tmp_path / "tokens")
    write(tmp_path / "whole")
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")


def test_a_whole_cache_is_left_as_it_is(tmp_path):
    write(tmp_path / "tokens")
    before = contents(tmp_path / "tokens")
    assert TokenWriter(tmp_path / "tokens", PLAN).missing() == []
    write(tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dvae": "xyz"}, "dvae was 'abc', is 'xyz'"),
        ({"data": "xyz"}, "data was 'def', is 'xyz'"),
        ({"crops": 1}, "crops was 2, is 1"),
        ({"shard": 5}, "shard was 4, is 5"),
        ({"transform": {"seed": 1}}, r"transform was \{\}, is \{'seed': 1\}"),
    ],
)
def test_going_on_with_another_plan_is_refused_with_both_keys(tmp_path, change, said):
    write(tmp_path / "tokens", shards=[0])
    before = contents(tmp_path / "tokens")
    other = replace(PLAN, **change)
    assert other.key != PLAN.key
    with pytest.raises(
        ValueError, match=f"tokens of key {PLAN.key}, this run makes {other.key}: {said}. They do not"
    ):
        TokenWriter(tmp_path / "tokens", other)
    assert contents(tmp_path / "tokens") == before


def test_a_shard_of_another_cache_is_refused_with_both_keys(tmp_path):
    other = replace(PLAN, dvae="xyz")
    write(tmp_path / "other", other)
    write(tmp_path / "tokens", shards=[0, 1])
    (tmp_path / "tokens" / shard_name(2)).write_bytes((tmp_path / "other" / shard_name(2)).read_bytes())
    with pytest.raises(
        ValueError, match=f"000002.* tokens of key {other.key}, this run makes {PLAN.key}; remove it"
    ):
        write(tmp_path / "tokens", shards=[])
    write(tmp_path / "whole")
    (tmp_path / "whole" / shard_name(2)).write_bytes((tmp_path / "other" / shard_name(2)).read_bytes())
    with pytest.raises(ValueError, match=f"000002.* tokens of key {other.key}, the cache is {PLAN.key}"):
        TokenCache(tmp_path / "whole").captions([9])


def test_a_folder_with_other_things_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="is no token cache; its contents would be mixed with one"):
            write(place)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "tokens").mkdir()
    assert write(tmp_path / "tokens").size == 11


def test_a_vocabulary_beyond_16_bits_is_refused():
    with pytest.raises(ValueError, match="16-bit codes; the vocabulary of 65537 is too large"):
        replace(PLAN, vocab=65537)


def test_a_cache_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of 11 images could be read"):
        write(tmp_path / "tokens", left_out=range(11))


@pytest.mark.parametrize("part", [-1, 2])
def test_a_part_that_is_none_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match=rf"part must lie in 0 \.\. 1 for 2 parts, got {part}"):
        TokenWriter(tmp_path / "tokens", PLAN, part, 2)


# Damage.


def test_a_folder_that_is_no_cache_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"nothing is not a token cache .* make one with scripts/encode_images\.py"
    ):
        TokenCache(tmp_path / "nothing")


def test_another_format_is_refused(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"kind": "tokens", "format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        TokenCache(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / shard_name(1)).unlink()
    with pytest.raises(ValueError, match=r"shard-000001.* has no bytes, expected .* the cache is damaged"):
        TokenCache(tmp_path / "tokens")


@pytest.mark.parametrize("share", [0, 0.3, 0.8, 0.97])
@pytest.mark.parametrize("name", [shard_name(2), "meta.json"])
def test_a_file_that_breaks_off_is_refused_and_can_be_mended(tmp_path, name, share):
    cache = write(tmp_path / "tokens")
    content = (tmp_path / "tokens" / name).read_bytes()
    (tmp_path / "tokens" / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"tokens.*(is not a token cache|the cache is damaged)"):
        TokenCache(tmp_path / "tokens")
    for found in (tmp_path / "tokens" / name, tmp_path / "tokens" / "meta.json"):
        found.unlink(missing_ok=True)
    assert write(tmp_path / "tokens").hash == cache.hash


def test_a_shard_that_breaks_off_before_the_cache_is_whole_is_named(tmp_path):
    write(tmp_path / "tokens", shards=[0, 1])
    (tmp_path / "tokens" / shard_name(2)).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"shard-000002.* is damaged or no shard of tokens .* encode again"):
        TokenWriter(tmp_path / "tokens", PLAN).finish()


@pytest.mark.parametrize(
    "meta", [[], {"kind": "tokens", "format": 1}, {"kind": "tokens", "format": 1, "shards": [3]}]
)
def test_meta_data_of_another_shape_are_refused(tmp_path, meta):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="tokens is not a token cache"):
        TokenCache(tmp_path / "tokens")


def test_another_kind_of_folder_is_refused(tmp_path):
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "meta.json").write_text(json.dumps({"kind": "dvae"}))
    with pytest.raises(ValueError, match="holds 'dvae', expected a token cache"):
        TokenCache(tmp_path / "tokens")


# Encoding.


class Brightness(nn.Module):
    """An image tokenizer that is no dVAE: the code is the mean of 16 x 16 pixels in 8 steps."""

    downsample_factor, vocab_size = 16, 8

    def encode(self, pixels):
        return (nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 16) * 7.99).long().flatten(1)

    def decode(self, tokens, grid=None):
        raise NotImplementedError


class Greys:
    """Ten grey images, each crop a little brighter; those in `broken` (number, crop) cannot be read."""

    size, resolution, hash = 10, 32, "greys"

    def __init__(self, broken=()):
        self.broken, self.read = set(broken), []

    def load(self, samples, augment="none", seed=0, replace=False):
        assert (augment, replace) == ("transformer", False)
        good = [(crop, number) for crop, number in samples if (number, crop) not in self.broken]
        self.read += good
        levels = np.array([number / 10 + crop / 8 for crop, number in good], np.float32).clip(0, 1)
        pixels = np.broadcast_to(levels[:, None, None, None], (len(good), 3, 32, 32)).copy()
        skips = [
            BadSample(number, f"grey {number}", "truncated")
            for crop, number in samples
            if (number, crop) in self.broken
        ]
        return ImageTextBatch(pixels, [[f"grey {number}"] for _, number in good], good, skips)


@pytest.fixture
def greys(monkeypatch) -> SimpleNamespace:
    """Encoding ten grey images with `Brightness`; .pairs says what was read, .run(...) encodes."""
    place = SimpleNamespace(pairs=Greys())
    monkeypatch.setattr(encoding, "load_dvae_input", lambda given, device: (Brightness(), "bright"))
    monkeypatch.setattr(encoding, "open_dataset", lambda config: place.pairs)

    def run(out, seed=0, workers=0, **settings):
        config = EncodeConfig(**{"shard": 4, "batch_size": 3, **settings})
        data = replace(EncodeImagesArgs().data, resolution=32, workers=workers)
        return encode_images(EncodeImagesArgs(out=out, seed=seed, device="cpu", data=data, encode=config))

    place.run = run
    return place


def test_any_image_tokenizer_encodes(greys, tmp_path):
    assert isinstance(Brightness(), ImageTokenizer)
    cache = greys.run(tmp_path / "tokens", crops=2)
    expected = [[[int((n / 10 + crop / 8) * 7.99)] * 4 for crop in range(2)] for n in range(10)]
    assert [cache.image_tokens([n, n], [0, 1]).tolist() for n in range(10)] == [
        [[min(code, 7) for code in crop] for crop in crops] for crops in expected
    ]
    assert cache.captions([3]) == [["grey 3"]]
    assert {cache.meta[name] for name in ("dvae", "data")} == {"bright", "greys"}


def test_a_image_with_a_broken_crop_is_left_out_and_told(greys, tmp_path, capsys):
    greys.pairs = Greys(broken=[(1, 0), (1, 1), (4, 1), (8, 0)])
    cache = greys.run(tmp_path / "tokens", crops=2)
    assert [cache.number(i) for i in range(cache.size)] == [0, 2, 3, 5, 6, 7, 9]
    assert cache.captions([3]) == [["grey 5"]]
    printed = capsys.readouterr().out
    assert "3 of 10 images could not be used and are left out" in printed
    assert "skipped 3 samples: 3 truncated" in printed
    lines = [
        json.loads(line) for line in (tmp_path / "tokens" / "bad_samples.jsonl").read_text().splitlines()
    ]
    assert [line["name"] for line in lines] == ["grey 1", "grey 4", "grey 8"]


def test_what_is_skipped_is_counted_over_stops(greys, tmp_path, capsys):
    greys.pairs = Greys(broken=[(1, 0), (9, 0)])
    greys.run(tmp_path / "tokens")
    for name in (shard_name(2), "meta.json"):
        (tmp_path / "tokens" / name).unlink()
    capsys.readouterr()
    greys.run(tmp_path / "tokens")
    assert "skipped 2 samples: 2 truncated" in capsys.readouterr().out
    assert len((tmp_path / "tokens" / "bad_samples.jsonl").read_text().splitlines()) == 2


def test_batches_of_broken_images_only_are_no_obstacle(greys, tmp_path):
    greys.pairs = Greys(broken=[(n, 0) for n in range(3)])
    assert greys.run(tmp_path / "tokens").size == 7


def test_the_cache_does_not_depend_on_batch_size_workers_or_parts(greys, tmp_path):
    greys.run(tmp_path / "whole", batch_size=1, crops=3)
    assert greys.run(tmp_path / "parts", batch_size=5, crops=3, part=1, parts=2) is None
    greys.run(tmp_path / "parts", batch_size=4, crops=3, workers=2, part=0, parts=2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_encoding_that_stopped_reads_the_shards_it_lacks_only(greys, tmp_path):
    greys.run(tmp_path / "tokens")
    for name in (shard_name(1), "meta.json"):
        (tmp_path / "tokens" / name).unlink()
    greys.pairs.read.clear()
    greys.run(tmp_path / "tokens")
    assert greys.pairs.read == [(0, n) for n in range(4, 8)]
    greys.pairs.read.clear()
    assert greys.run(tmp_path / "tokens").size == 10  # whole: nothing is read
    assert greys.pairs.read == []


def test_another_seed_is_another_cache(greys, tmp_path):
    key = greys.run(tmp_path / "tokens").key
    with pytest.raises(
        ValueError, match=f"tokens of key {key}, this run makes .*transform was .*'seed': 0.*'seed': 1"
    ):
        greys.run(tmp_path / "tokens", seed=1)


def test_data_that_moved_are_the_same_data(greys):
    def key(path):
        places = {name: path for name in ("path", "image_root", "val_path")}
        run = EncodeImagesArgs(data=replace(EncodeImagesArgs().data, resolution=32, **places))
        return Encoder(Brightness(), greys.pairs, run, torch.device("cpu")).spec("w").key

    assert key("here") == key("there")


def test_tokens_of_another_dvae_are_refused_with_both_hashes(chain, tiny_runs, tmp_path):
    run = replace(tiny_runs.encode, out=tmp_path / "tokens", dvae=chain / "dvae")
    own = encode_images(run).meta["dvae"]
    train_dvae(replace(tiny_runs.dvae, out=tmp_path / "other", seed=9, steps=1))
    with pytest.raises(ValueError, match=f"dvae was '{own}', is '[0-9a-f]{{16}}'"):
        encode_images(replace(run, dvae=tmp_path / "other"))
    training = replace(tiny_runs.transformer, text_tokenizer=chain / "text", out=tmp_path / "transformer")
    said = f"holds tokens of dVAE {own}, .*other is [0-9a-f]{{16}}: they do not belong together"
    with pytest.raises(ValueError, match=said):
        train_transformer(replace(training, tokens=tmp_path / "tokens", dvae=tmp_path / "other"))


def test_a_resolution_that_gives_no_whole_tokens_is_refused(greys, tmp_path):
    with pytest.raises(ValueError, match="resolution 40 is no multiple of 16"):
        encode_images(
            EncodeImagesArgs(
                out=tmp_path / "t", device="cpu", data=replace(EncodeImagesArgs().data, resolution=40)
            )
        )


def test_a_tokenizer_that_breaks_its_word_is_named(greys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Brightness, "encode", lambda self, pixels: torch.zeros(len(pixels), 3, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match=r"gave \(3, 3\) tokens, expected \(3, 4\)"):
        greys.run(tmp_path / "a")
    monkeypatch.setattr(Brightness, "encode", lambda self, pixels: torch.full((len(pixels), 4), 8))
    with pytest.raises(ValueError, match=r"image tokens must be in \[0, 8\), got 8"):
        greys.run(tmp_path / "b")


def test_the_turn_of_a_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_part(EncodeConfig()) == (0, 1)
    assert resolve_part(EncodeConfig(part=1, parts=3)) == (1, 3)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_part(EncodeConfig()) == (2, 4)
    assert resolve_part(EncodeConfig(part=1, parts=3)) == (1, 3)
    with pytest.raises(ValueError, match=r"both --encode\.part and --encode\.parts"):
        resolve_part(EncodeConfig(part=1))
