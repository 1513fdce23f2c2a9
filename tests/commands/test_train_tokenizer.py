"""The train-tokenizer command: its file, its report, and a vocabulary that is too small."""

from dalle.text import load_text_tokenizer
from tests.helpers.refusals import assert_refused


def test_it_writes_the_tokenizer_and_the_coverage(script, tmp_path):
    words = ("--data.path", "shapes", "--captions", "500", "--text.vocab-size", "400", "--out", "text")
    done = script("train_tokenizer", *words)
    assert done.code == 0, done.err
    text = load_text_tokenizer(tmp_path / "text" / "text_tokenizer.json")
    assert text.vocab_size <= 400
    assert text.decode(text.encode("a red circle")) == "a red circle"
    assert f"{text.vocab_size} ids" in done.out


def test_a_vocabulary_below_the_alphabet_is_refused(script):
    """Before captions are read if it has no room for bytes."""
    words = ("--data.path", "shapes", "--captions", "9", "--text.vocab-size")
    assert_refused(script("train_tokenizer", *words, "259"), "too small")
    done = script("train_tokenizer", "--text.vocab-size", "3")
    assert done.code == 2
    assert "too small" in done.err
