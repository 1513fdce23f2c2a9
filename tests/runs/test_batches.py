"""Batches of a step: any number of processes and workers load the same samples, from every source."""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dalle.data import BatchReader, DataConfig, ImageTextLoader, TokenCache, open_dataset, sample_captions
from dalle.data.dataloader import worker_count
from dalle.data.token_cache import TokenCacheSpec, TokenWriter
from dalle.runs.batches import CLIPBatch, DVAEBatch, TokenBatches, TokenLoader
from dalle.runs.inputs import load_text_input
from dalle.shapes.dataset import ShapesDataset
from dalle.types import BadSample, ImageTextBatch
from tests.helpers.formats import FORMS, IDS, csv_file

BATCH, STEPS, SEED = 6, 5, 3  # more than two epochs of twelve
RANKS = (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)
"""One process, and each of two and of three: (rank, world)."""


@dataclass(frozen=True)
class Listed:
    """A batch as a list: sample, sampled caption and pixels of each image."""

    def __call__(self, batch, step):
        captions = sample_captions(batch, SEED)
        return [
            (sample, text, image.tobytes())
            for sample, text, image in zip(batch.samples, captions, batch.pixels, strict=True)
        ]


def loaded(pairs, rank=0, world=1, first=0, last=STEPS, workers=0, augment="dvae"):
    """Step by step, what a process is given."""
    task = BatchReader(pairs, BATCH, SEED, augment, Listed(), rank=rank, world=world)
    with ImageTextLoader(task, last, workers) as batches:
        return [batches(step) for step in range(first, last)]


def joined(parts):
    """Steps of several processes, in the order of their ranks."""
    return [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)]


@pytest.fixture(params=[*FORMS, None], ids=[*IDS, "shapes"])
def pairs(request, tmp_path):
    if request.param is None:
        return ShapesDataset(16)
    form, columns = request.param
    return open_dataset(
        DataConfig(str(form(tmp_path)), resolution=16, val_fraction=1e-9, caption_column=columns)
    )


def test_the_shares_of_every_source_are_the_step_of_one_process(pairs):
    """Images, their random crops and the captions sampled; also where a run goes on with others."""
    alone = loaded(pairs)
    seen = Counter(sample for step in alone for sample, *_ in step)
    epochs, size = (1, 30) if pairs.size is None else (2, 12)
    assert set(itertools.product(range(epochs), range(size))) <= set(seen)
    assert set(seen.values()) == {1}
    assert joined(loaded(pairs, rank, 2, 0, 3) for rank in range(2)) == alone[:3]
    three_go_on = joined(loaded(pairs, rank, 3, 3, 5) for rank in range(3))
    assert three_go_on == alone[3:]


def test_nor_does_the_number_of_workers_matter(tmp_path):
    pairs = open_dataset(DataConfig(str(csv_file(tmp_path)), resolution=16, val_fraction=1e-9))
    alone = loaded(pairs)
    assert joined(loaded(pairs, rank, 2, 0, 2, workers=rank) for rank in range(2)) == alone[:2]
    assert joined(loaded(pairs, rank, 2, 2, 5, workers=2 - rank) for rank in range(2)) == alone[2:]
    assert loaded(pairs, first=2, workers=1) == alone[2:]


def test_broken_samples_are_replaced_by_the_same_ones_and_each_process_names_what_it_met(tmp_path):
    images = csv_file(tmp_path).parent / "images"
    for number in (2, 7):
        (images / f"p{number:03}.png").write_bytes(b"")
    with (tmp_path / "pairs.csv").open("a") as table:
        table.write("only one field\n")
    pairs = open_dataset(DataConfig(str(tmp_path), resolution=16, val_fraction=1e-9))
    alone, parts, named = loaded(pairs), [], []
    for rank in range(2):
        task = BatchReader(pairs, BATCH, SEED, "dvae", Listed(), rank=rank, world=2)
        with ImageTextLoader(task, STEPS, log=tmp_path / "bad_samples.jsonl") as batches:
            parts.append([batches(step) for step in range(STEPS)])
            named.append(batches.bad_samples.counts)
    assert joined(parts) == alone
    assert [counts["broken row"] for counts in named] == [1, 0]  # what opening found is told once
    texts = [(tmp_path / name).read_text() for name in ("bad_samples.jsonl", "bad_samples-1.jsonl")]
    assert [text.count("pairs.csv:14") for text in texts] == [1, 0]
    assert all(any(f"p{number:03}.png" in text for text in texts) for number in (2, 7))


def test_each_process_judges_by_what_it_has_read_itself():
    """Of a hundred that it reads two are broken: a rank of four, which reads a quarter, ends all the same."""

    def load(samples, *_, replace):
        bad = [BadSample(index, "m", "truncated") for _, index in samples[:2]]
        return ImageTextBatch(np.zeros((len(samples), 3, 1, 1)), [], samples, bad)

    pairs = SimpleNamespace(size=10**6, load=load)
    task = BatchReader(pairs, 400, SEED, "none", lambda batch, step: step, rank=3, world=4)
    with ImageTextLoader(task, 100) as batches:
        for step in range(50):
            assert batches(step) == step
        with pytest.raises(ValueError, match="102 of 5202 samples cannot be used"):
            batches(50)


def test_the_batch_of_the_dvae_is_shared():
    pairs = ShapesDataset(16)
    whole, *parts = (
        BatchReader(pairs, 6, 1, "dvae", DVAEBatch(8, 1, r, w), rank=r, world=w)(4)[0] for r, w in RANKS
    )
    assert torch.equal(torch.cat(parts[:2]), whole)
    assert torch.equal(torch.cat(parts[2:]), whole)


def test_the_batch_of_clip_is_shared(chain):
    pairs = ShapesDataset(48, siblings=True)
    finish = CLIPBatch(load_text_input(chain / "text"), 1, pairs)
    whole, *parts = (BatchReader(pairs, 6, 1, "transformer", finish, rank=r, world=w)(2)[0] for r, w in RANKS)
    for halves in (parts[:2], parts[2:]):
        pixels, ids, broken = zip(*halves, strict=True)
        assert torch.equal(torch.cat(pixels), whole[0])
        assert list(itertools.chain(*ids)) == whole[1]
        assert torch.equal(torch.cat(broken), whole[2])


@pytest.fixture
def token_batches(chain):
    """token_batches(run, **rank): the chain's token cache as batches."""
    cache, text = TokenCache(chain / "tokens"), load_text_input(chain / "text")
    return lambda run, **rank: TokenBatches(cache, text, run.model.layout, run, **rank)


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_a_token_cache_are_the_step_of_one_process(token_batches, tiny_runs, world):
    """Also with captions left empty and merges skipped, at any step."""
    run = replace(tiny_runs.transformer, bpe_dropout=0.3, caption_dropout=0.3)
    alone = token_batches(run)
    shares = [token_batches(run, rank=rank, world=world) for rank in range(world)]
    for step in (0, 3, 4, 11):  # twenty images in steps of four
        assert torch.equal(torch.cat([share(step)[0] for share in shares]), alone(step)[0])
    assert torch.equal(shares[-1].val(), alone.val())


def test_workers_make_the_same_ids_and_count_captions_that_were_cut(token_batches, tiny_runs):
    """Also from a later step on."""
    model = replace(tiny_runs.transformer.model, text_len=8)
    data = {workers: replace(tiny_runs.transformer.data, workers=workers) for workers in (0, 2)}
    alone, many = (
        token_batches(replace(tiny_runs.transformer, steps=9, model=model, data=each))
        for each in data.values()
    )
    with TokenLoader(alone) as simple, TokenLoader(many) as parallel:
        for step in (0, 1, 2, 6, 7):
            ids = simple(step)
            assert torch.equal(ids, alone(step)[0])
            assert torch.equal(ids, parallel(step))
    assert parallel.truncated == simple.truncated > 0


def test_a_batch_that_does_not_divide_is_refused(token_batches, tiny_runs):
    with pytest.raises(ValueError, match="a batch of 4 does not divide among 3 processes"):
        token_batches(tiny_runs.transformer, rank=0, world=3)(0)


def test_the_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(17)), raising=False)
    for processes, workers in ((1, 8), (4, 3), (40, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert worker_count(-1, 100) == workers
    assert worker_count(5, 100) == 5


@pytest.fixture
def two_crops(tmp_path, tiny_runs, chain) -> TokenBatches:
    """Twelve images in two crops, tokens 0 .. 15, four held out; a caption names its image."""
    plan = TokenCacheSpec(dvae="d", data="p", grid=(4, 4), vocab=16, images=12, crops=2, shard=5)
    writer = TokenWriter(tmp_path / "tokens", plan)
    tokens = np.random.default_rng(0).integers(16, size=(12, 2, 16))
    for shard in writer.missing():
        numbers = plan.numbers(shard)
        writer.write(shard, tokens[numbers], [[f"number {n}"] for n in numbers])
    train = replace(tiny_runs.transformer.train, batch_size=16)
    run = replace(tiny_runs.transformer, eval_samples=4, bpe_dropout=0.0, train=train)
    return TokenBatches(writer.finish(), load_text_input(chain / "text"), run.model.layout, run)


def test_no_crop_of_a_held_out_image_is_trained_on(two_crops):
    """An epoch is both crops of the first eight."""
    cache, layout = two_crops.cache, two_crops.layout
    _, image = layout.unpack(two_crops(0)[0])
    expected = cache.image_tokens([p for p in range(8) for _ in range(2)], [0, 1] * 8)
    assert sorted(image.tolist()) == sorted(expected.tolist())
    assert torch.equal(layout.unpack(two_crops.val())[1], cache.image_tokens([8, 9, 10, 11]))


@pytest.mark.parametrize(("world", "passes", "sizes"), [(1, 1, [4]), (1, 8, [2, 2]), (4, 4, [1] * 4)])
def test_an_evaluation_takes_no_more_at_once_than_a_pass_of_a_training_step(two_crops, world, passes, sizes):
    train = replace(two_crops.run.train, grad_accum_steps=passes)
    batches = replace(two_crops, run=replace(two_crops.run, train=train), world=world)
    found = batches.val_batches()
    assert [len(ids) for ids in found] == sizes
    assert torch.equal(torch.cat(found), two_crops.val())


def test_caption_and_image_of_a_sample_belong_together(two_crops):
    cache, layout = two_crops.cache, two_crops.layout
    names = layout.pad_text([two_crops.text.encode(f"number {n}") for n in range(8)]).tolist()
    for step in range(4):
        for words, tokens in zip(*(part.tolist() for part in layout.unpack(two_crops(step)[0])), strict=True):
            assert tokens in cache.image_tokens([names.index(words)] * 2, [0, 1]).tolist()
