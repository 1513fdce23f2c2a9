"""Vocabulary coverage, and the sample of captions that train_tokenizer reads."""

from dataclasses import replace

import pytest

from dalle.commands.train_tokenizer import TrainTokenizerArgs, read_captions, sample_indices, train_tokenizer
from dalle.io.files import read_json
from dalle.text import TextTokenizerConfig, train_text_tokenizer
from dalle.text.coverage import vocabulary_coverage


class Corpus:
    """A million images with two captions each; .read lists the indices read, .most is the largest batch."""

    def __init__(self, size=1_000_000):
        self.size, self.read, self.most = size, [], 0

    def captions(self, numbers):
        self.read += numbers
        self.most = max(self.most, len(numbers))
        return [[f"image {n}", "a red dog"] for n in numbers]


def test_a_sample_of_a_large_corpus_is_spread_and_depends_on_the_seed():
    samples = {seed: list(sample_indices(10**9, 1000, seed)) for seed in (0, 1)}
    assert samples[0] == list(sample_indices(10**9, 1000, 0)) != samples[1]
    for numbers in samples.values():
        assert all(number // 10**6 == stretch for stretch, number in enumerate(numbers))
    share = sum(number % 10**6 for number in samples[0]) / 10**9
    assert share == pytest.approx(0.5, abs=0.05)  # five standard deviations


@pytest.mark.parametrize(("size", "most", "numbers"), [(5, 9, 5), (9, 9, 9), (None, 3, 3), (10, 9, 9)])
def test_a_small_corpus_is_read_whole_and_an_endless_one_from_its_start(size, most, numbers):
    indices = list(sample_indices(size, most, 0))
    assert len(indices) == len(set(indices)) == numbers
    assert indices == list(range(numbers)) or size == 10


def test_captions_are_streamed():
    corpus = Corpus()
    captions = read_captions(corpus, 1000, 0)
    assert next(captions).startswith("image ")
    assert len(corpus.read) == 256
    assert len(list(captions)) == 1999
    assert (len(corpus.read), corpus.most) == (1000, 256)


def test_training_again_on_the_same_sample_reads_the_same(monkeypatch, tmp_path):
    corpora = [Corpus(), Corpus()]
    for corpus, name in zip(corpora, "ab", strict=True):
        monkeypatch.setattr("dalle.data.open_dataset", lambda *_, corpus=corpus, **__: corpus)
        train_tokenizer(TrainTokenizerArgs(out=tmp_path / name, text=TextTokenizerConfig(300), captions=50))
    assert corpora[0].read == corpora[1].read
    assert len(corpora[0].read) == 100  # once to learn, once to measure


def test_the_report_counts_by_hand():
    text = train_text_tokenizer(["ab ab"] * 10, TextTokenizerConfig())  # a word is one token
    report = vocabulary_coverage(text, ["ab", "ab ab ab", "ab é!", "ab " * 20], max_caption_len=4)
    assert report["captions"] == 4
    letters, outside = 2 + 6 + 4 + 40, 2  # é and ! are 2 bytes and 1, each after a mark
    assert report["coverage"] == pytest.approx(1 - outside / letters, abs=1e-6)
    lengths = [1, 3, 1 + 3 + 2, 20]
    mean = sum(lengths) / 4
    assert report["tokens_per_caption"] == {"mean": mean, "median": 6, "95_of_100": 20, "most": 20}
    assert (report["max_caption_len"], report["truncated"]) == (4, 0.5)
    assert report["outside_the_alphabet"] == "bytes"


def test_no_captions_make_an_empty_report():
    text = train_text_tokenizer(["ab"], TextTokenizerConfig(4, byte_fallback=False))
    report = vocabulary_coverage(text, [], 4)
    assert (report["captions"], report["truncated"], report["coverage"]) == (0, 0.0, 1.0)
    assert report["outside_the_alphabet"] == "unknown (id 0)"


def test_the_stage_prints_and_writes_the_report(tiny_runs, tmp_path, capsys):
    run = replace(tiny_runs.text, out=tmp_path / "text", captions=500)
    text = train_tokenizer(run)
    report = read_json(tmp_path / "text" / "report.json")
    assert report["vocab_size"] == text.vocab_size
    assert report["max_caption_len"] == run.model.layout.max_caption_len == 19
    assert report["coverage"] > 0.999
    assert "95 of 100" in capsys.readouterr().out
