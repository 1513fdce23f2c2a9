"""Encoding of a dataset into a token cache: dalle/commands/encode_images.py, dalle/runs/encoding.py."""

import json
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_dvae import EncodeConfig, train_dvae
from dalle.data.token_cache import shard_name
from dalle.runs import encoding
from dalle.runs.encoding import Encoder, resolve_part
from dalle.types import BadSample, ImageTextBatch, ImageTokenizer
from tests.data.test_token_cache import contents


class Brightness(nn.Module):
    """An image tokenizer that is no dVAE: the code is the mean of 16 x 16 pixels in 8 steps."""

    downsample_factor, vocab_size = 16, 8

    def encode(self, pixels):
        return (nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 16) * 7.99).long().flatten(1)

    def decode(self, tokens, grid=None):
        raise NotImplementedError


class Grays:
    """Ten gray images, each crop a little brighter; those in `bad` (number, crop) cannot be read."""

    size, resolution, hash = 10, 32, "grays"

    def __init__(self, bad=()):
        self.bad, self.read = set(bad), []

    def load(self, samples, augment="none", seed=0, replace=False):
        assert (augment, replace) == ("transformer", False)
        good = [(crop, number) for crop, number in samples if (number, crop) not in self.bad]
        self.read += good
        levels = np.array([number / 10 + crop / 8 for crop, number in good], np.float32).clip(0, 1)
        pixels = np.broadcast_to(levels[:, None, None, None], (len(good), 3, 32, 32)).copy()
        bad = [number for crop, number in samples if (number, crop) in self.bad]
        skipped = [BadSample(number, f"gray {number}", "truncated") for number in bad]
        return ImageTextBatch(pixels, [[f"gray {number}"] for _, number in good], good, skipped)


@pytest.fixture
def grays(monkeypatch) -> SimpleNamespace:
    """.run(out, ...) encodes ten gray images with `Brightness`; .dataset records what was read."""
    found = SimpleNamespace(dataset=Grays())
    monkeypatch.setattr(encoding, "load_dvae_input", lambda given, device: (Brightness(), "bright"))
    monkeypatch.setattr(encoding, "open_dataset", lambda config: found.dataset)

    def run(out, seed=0, workers=0, resolution=32, **settings):
        config = EncodeConfig(**{"shard": 4, "batch_size": 3, **settings})
        data = replace(EncodeImagesArgs().data, resolution=resolution, workers=workers)
        return encode_images(EncodeImagesArgs(out=out, seed=seed, device="cpu", data=data, encode=config))

    found.run = run
    return found


def test_any_image_tokenizer_encodes(grays, tmp_path):
    assert isinstance(Brightness(), ImageTokenizer)
    cache = grays.run(tmp_path / "tokens", crops=2)
    for n in range(10):
        expected = [[min(int((n / 10 + crop / 8) * 7.99), 7)] * 4 for crop in range(2)]
        assert cache.image_tokens([n, n], [0, 1]).tolist() == expected
    assert cache.captions([3]) == [["gray 3"]]
    assert (cache.meta["dvae"], cache.meta["data"]) == ("bright", "grays")


def test_an_image_with_a_bad_crop_is_left_out_and_logged(grays, tmp_path, capsys):
    grays.dataset = Grays(bad=[(1, 0), (1, 1), (4, 1), (8, 0)])
    cache = grays.run(tmp_path / "tokens", crops=2)
    assert cache.captions(range(cache.size)) == [[f"gray {i}"] for i in (0, 2, 3, 5, 6, 7, 9)]
    printed = capsys.readouterr().out
    assert "3 of 10 images could not be used and are left out" in printed
    assert "3 truncated" in printed
    lines = (tmp_path / "tokens" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["gray 1", "gray 4", "gray 8"]


def test_bad_samples_are_counted_across_a_resume(grays, tmp_path, capsys):
    grays.dataset = Grays(bad=[(0, 0), (1, 0), (2, 0), (9, 0)])  # the first batch has no other
    assert grays.run(tmp_path / "tokens").size == 6
    for name in (shard_name(2), "meta.json"):
        (tmp_path / "tokens" / name).unlink()
    capsys.readouterr()
    grays.run(tmp_path / "tokens")
    assert "4 truncated" in capsys.readouterr().out
    assert len((tmp_path / "tokens" / "bad_samples.jsonl").read_text().splitlines()) == 4


def test_the_cache_does_not_depend_on_batch_size_workers_or_parts(grays, tmp_path):
    grays.run(tmp_path / "single", batch_size=1, crops=3)
    assert grays.run(tmp_path / "parts", batch_size=5, crops=3, part=1, parts=2) is None
    grays.run(tmp_path / "parts", batch_size=4, crops=3, workers=2, part=0, parts=2)
    assert contents(tmp_path / "parts") == contents(tmp_path / "single")


def test_a_resumed_encoding_reads_the_missing_shards_only(grays, tmp_path):
    grays.run(tmp_path / "tokens")
    for name in (shard_name(1), "meta.json"):
        (tmp_path / "tokens" / name).unlink()
    grays.dataset.read.clear()
    grays.run(tmp_path / "tokens")
    assert grays.dataset.read == [(0, n) for n in range(4, 8)]
    grays.dataset.read.clear()
    assert grays.run(tmp_path / "tokens").size == 10  # complete: nothing is read
    assert grays.dataset.read == []


def test_a_part_is_encoded_by_one_process_at_a_time(grays, tmp_path, monkeypatch):
    lock = Mock(side_effect=ValueError("in use"))
    with monkeypatch.context() as other:
        other.setattr(encoding, "lock_directory", lock)
        with pytest.raises(ValueError, match="in use"):
            grays.run(tmp_path / "tokens", part=1, parts=2)
    lock.assert_called_once_with(tmp_path / "tokens", ".partial-1.lock")
    assert grays.dataset.read == []
    grays.run(tmp_path / "tokens", part=1, parts=2)
    assert not list((tmp_path / "tokens").glob("*.lock"))


def test_another_seed_is_another_cache_and_another_path_is_not(grays, tmp_path):
    def key(path):
        paths = {name: path for name in ("path", "image_root", "val_path")}
        args = EncodeImagesArgs(data=replace(EncodeImagesArgs().data, resolution=32, **paths))
        return Encoder(Brightness(), grays.dataset, args, torch.device("cpu")).spec("w").key

    assert key("here") == key("there")
    key = grays.run(tmp_path / "tokens").key
    with pytest.raises(ValueError, match=f"{key}.*'seed': 0.*'seed': 1"):
        grays.run(tmp_path / "tokens", seed=1)


def test_another_dvae_is_refused_with_both_hashes(chain, tiny_runs, tmp_path):
    args = replace(tiny_runs.encode, out=tmp_path / "tokens", dvae=chain / "dvae")
    own = encode_images(args).meta["dvae"]
    train_dvae(replace(tiny_runs.dvae, out=tmp_path / "other", seed=9, steps=1))
    with pytest.raises(ValueError, match=f"dvae was '{own}', is '[0-9a-f]{{16}}'"):
        encode_images(replace(args, dvae=tmp_path / "other"))


def test_what_does_not_fit_the_tokenizer_is_refused(grays, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="resolution 40 is no multiple of 16"):
        grays.run(tmp_path / "tokens", resolution=40)
    monkeypatch.setattr(Brightness, "encode", lambda self, x: torch.zeros(len(x), 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(3, 3\) tokens, expected \(3, 4\)"):
        grays.run(tmp_path / "a")
    monkeypatch.setattr(Brightness, "encode", lambda self, x: torch.full((len(x), 4), 8))
    with pytest.raises(ValueError, match=r"\[0, 8\), got 8"):
        grays.run(tmp_path / "b")


def test_the_part_of_a_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_part(EncodeConfig()) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert resolve_part(EncodeConfig()) == (2, 4)
    assert resolve_part(EncodeConfig(part=1, parts=3)) == (1, 3)
    with pytest.raises(ValueError, match=r"both --encode\.part and --encode\.parts"):
        resolve_part(EncodeConfig(part=1))
