"""The byte-pair encoding of captions (section 2.2): dalle/text."""

import json
import math
import os
import random
import sys
from collections import Counter
from itertools import pairwise, product
from unittest.mock import Mock

import pytest
import youtokentome

from dalle.text import TextTokenizer, TextTokenizerConfig, load_text_tokenizer, train_text_tokenizer
from dalle.text.tokenizer import FIRST_BYTE_ID, MAX_PIECE, UNKNOWN_ID, WORD_START, normalize

COLORS = ["red", "green", "blue", "yellow", "purple", "orange"]
SHAPES = ["circle", "square", "triangle", "star", "photograph", "illustration"]
PLACES = ["on the left", "under a dog's bowl", "(seen from above)", "in 1984, by night", "of 3.5 m"]
CAPTIONS = [f"A {c} {s} {p}, the {c2}-{s}!" for c, c2, s, p in product(COLORS, COLORS, SHAPES, PLACES)]
CONFIG = TextTokenizerConfig(vocab_size=390)
N_BYTES = 256


def train_both(captions, config):
    """Our tokenizer and the youtokentome model that it was read from."""
    models, train = [], youtokentome.BPE.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(youtokentome.BPE, "train", lambda **options: models.append(train(**options)))
        tokenizer = train_text_tokenizer(captions, config)
    return tokenizer, models[0]


@pytest.fixture(scope="module")
def trained():
    return train_both(CAPTIONS, CONFIG)


@pytest.fixture
def tokenizer(trained):
    return trained[0]


def by_hand(*merges):
    """A tokenizer with the merges given as "left right", the first with the highest priority."""
    characters = "".join(sorted({WORD_START, *"".join(merges)} - {" "}))
    ids = {character: 1 + N_BYTES + i for i, character in enumerate(characters)}
    pairs = []
    for merge in merges:
        left, right = merge.split(" ")
        pairs.append((ids[left], ids[right]))
        ids[left + right] = 1 + N_BYTES + len(ids)
    return TextTokenizer(TextTokenizerConfig(), characters, pairs)


# Normalising: lower case, split on everything outside a-z (https://github.com/openai/DALL-E/issues/22).


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("A Red DOG", ["a", "red", "dog"]),
        ("  tabs\tand\nlines ", ["tabs", "and", "lines"]),
        ("dog's", ["dog", "'", "s"]),
        ("in 1984", ["in", "1", "9", "8", "4"]),
        ("b2b", ["b", "2", "b"]),
        ("snake_case!?", ["snake", "_", "case", "!", "?"]),
        ("café", ["caf", "é"]),
        ("Красная собака", ["красная", "собака"]),
        ("schÃ¶n &amp; gut", ["sch", "ö", "n", "&", "gut"]),  # repaired by ftfy
        ("\u201cquoted\u201d", ['"', "quoted", '"']),
        (f"a{WORD_START}b", ["a", "b"]),
        ("a" * (MAX_PIECE + 1), ["a" * MAX_PIECE, "a"]),
        (" ", []),
    ],
)
def test_normalize(caption, pieces):
    assert normalize(caption) == pieces


# Ids: unknown, bytes, characters, merges.


def test_ids_are_bytes_then_characters_then_merges(tokenizer):
    first_merge = 1 + N_BYTES + len(tokenizer.characters)
    assert tokenizer.vocab_size == CONFIG.vocab_size == first_merge + len(tokenizer.merges)
    decoded = [tokenizer.decode([i]) for i in range(FIRST_BYTE_ID, FIRST_BYTE_ID + 128)]
    assert decoded == [chr(i) if not chr(i).isspace() else "" for i in range(128)]
    characters = tokenizer.decode(range(1 + N_BYTES, first_merge)).replace(" ", "")
    assert characters == tokenizer.characters.replace(WORD_START, "")
    for merged, pair in enumerate(tokenizer.merges, start=first_merge):
        assert tokenizer.decode([merged]) == tokenizer.decode(pair)


def test_merges_never_cross_a_piece(tokenizer):
    words = {tokenizer.decode([i]) for i in range(1 + N_BYTES, tokenizer.vocab_size)}
    assert all(word == "" or len(normalize(word)) == 1 for word in words)
    assert {"photograph", "triangle"} <= words
    assert not {"19", "'s", "1984", "-circle"} & words


# Encoding without dropout is youtokentome's.


def test_captions_encode_as_youtokentome_encodes_them(trained):
    tokenizer, theirs = trained
    rng = random.Random(0)
    letters = tokenizer.characters.replace(WORD_START, "") + "      "
    captions = CAPTIONS + ["".join(rng.choices(letters, k=rng.randrange(80))) for _ in range(3000)]
    expected = theirs.encode([" ".join(normalize(caption)) for caption in captions])
    # youtokentome has no bytes; unknown is 0 in both
    shifted = [[i + N_BYTES if i != UNKNOWN_ID else i for i in ids] for ids in expected]
    assert [tokenizer.encode(caption) for caption in captions] == shifted
    assert sum(map(len, expected[: len(CAPTIONS)])) < 0.5 * sum(map(len, CAPTIONS))


def test_without_byte_fallback_a_run_of_unknown_characters_is_one_unknown():
    tokenizer, theirs = train_both(CAPTIONS, TextTokenizerConfig(vocab_size=150, byte_fallback=False))
    for caption in ["a красная star", "dog zzjj dog", "日本", "aza"]:
        assert tokenizer.encode(caption) == theirs.encode([" ".join(normalize(caption))])[0]
    assert tokenizer.encode("zzjj")[1:] == [UNKNOWN_ID]
    assert tokenizer.decode(tokenizer.encode("a zzjj star")) == "a \ufffd star"


def test_byte_fallback_encodes_what_the_alphabet_lacks(tokenizer):
    mark = tokenizer.encode("é")[0]
    assert tokenizer.decode([mark]) == ""
    assert tokenizer.encode("é") == [mark, FIRST_BYTE_ID + 0xC3, FIRST_BYTE_ID + 0xA9]
    for caption in ["красная собака", "赤い犬", "zj", "\N{DOG FACE} 犬!"]:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


# Decoding.


def test_decode_gives_a_readable_caption(tokenizer):
    for caption in ("a dog's bowl, 12.5 m (or so) at 10:45!", "black-and-white; and/or", "", *CAPTIONS[:3]):
        assert tokenizer.decode(tokenizer.encode(caption)) == caption.lower()


def test_decode_then_encode_gives_the_ids_back(tokenizer):
    rng = random.Random(1)
    printable = [chr(i) for i in range(32, 127)] + ["\u4e2d", "\u0436", "\N{DOG FACE}", "   "]
    for _ in range(1000):
        ids = tokenizer.encode("".join(rng.choices(printable, k=40)))
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_decoding_of_damaged_ids(tokenizer):
    assert tokenizer.decode(tokenizer.encode("red é")[:-1]) == "red \ufffd"
    for token in (-1, 390):
        with pytest.raises(ValueError, match=rf"token {token} at position 2 .* 0 \.\. 389"):
            tokenizer.decode([3, 4, token])


# BPE-dropout (Provilkov et al. 2020, Algorithm 1).


def exact_dropout_distribution(tokenizer, word, dropout):
    """{segmentation: probability}, by following every branch of Algorithm 1."""
    first_merge = tokenizer.vocab_size - len(tokenizer.merges)
    ids = {pair: first_merge + rank for rank, pair in enumerate(tokenizer.merges)}
    mark, *letters = tokenizer.encode(word, dropout=1.0, seed=0)
    open_states, result = {(mark, *letters): 1.0}, Counter()
    while open_states:
        state, probability = open_states.popitem()
        candidates = sorted((ids[pair], at) for at, pair in enumerate(pairwise(state)) if pair in ids)
        for merged, at in candidates:
            following = (*state[:at], merged, *state[at + 2 :])
            open_states[following] = open_states.get(following, 0) + probability * (1 - dropout)
            probability *= dropout
        result[state] += probability
    return result


def chi_square_excess(samples, distribution):
    """Standard deviations by which chi-square exceeds its mean; classes expected under 5 times are pooled."""
    n = sum(samples.values())
    assert set(samples) <= set(distribution)
    classes = [(samples[outcome], n * p) for outcome, p in distribution.items() if n * p >= 5]
    observed, expected = (n - sum(counts) for counts in zip(*classes, strict=True))
    if expected >= 1:
        classes.append((observed, expected))
    freedom = len(classes) - 1
    return (sum((o - e) ** 2 / e for o, e in classes) - freedom) / math.sqrt(2 * freedom)


# A right answer exceeds 5 standard deviations about once in 1,000 seeds.
TOO_FAR = 5
N_SAMPLES = 4000
ONE_TREE = by_hand("a b", "c d", f"{WORD_START} ab", f"{WORD_START}ab cd")  # no merge excludes another
OVERLAPPING = by_hand("e n", "o k", "t ok", "k e", "t o", "ke n", "tok en", f"{WORD_START} token")


def sample_segmentations(tokenizer, word, dropout):
    return Counter(tuple(tokenizer.encode(word, dropout, seed=(7, i))) for i in range(N_SAMPLES))


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize(("tokenizer", "word"), [(ONE_TREE, "abcd"), (OVERLAPPING, "token")])
def test_dropout_has_the_distribution_of_algorithm_1(tokenizer, word, dropout):
    distribution = exact_dropout_distribution(tokenizer, word, dropout)
    assert sum(distribution.values()) == pytest.approx(1)
    assert chi_square_excess(sample_segmentations(tokenizer, word, dropout), distribution) < TOO_FAR


def test_dropout_probabilities_by_hand():
    """abc with the merges bc, ab, (ab)c: bc unless skipped; else ab unless skipped, then (ab)c likewise."""
    tokenizer, p = by_hand("b c", "a b", "ab c"), 0.1
    a, b, c, mark, bc, ab, abc = range(1 + N_BYTES, tokenizer.vocab_size)
    expected = {(mark, a, bc): 1 - p, (mark, abc): p * (1 - p) ** 2}
    expected |= {(mark, ab, c): p * (1 - p) * p, (mark, a, b, c): p * p}
    assert exact_dropout_distribution(tokenizer, "abc", p) == pytest.approx(expected)


def test_another_dropout_would_be_noticed():
    samples = sample_segmentations(OVERLAPPING, "token", 0.13)
    assert chi_square_excess(samples, exact_dropout_distribution(OVERLAPPING, "token", 0.1)) > 2 * TOO_FAR


def to_youtokentome(tokenizer, path):
    """The same vocabulary in the text format of youtokentome, loaded by youtokentome."""
    n = len(tokenizer.characters)
    lines = [(n, len(tokenizer.merges)), *((ord(c), 1 + i) for i, c in enumerate(tokenizer.characters))]
    lines += [(x - N_BYTES, y - N_BYTES, 1 + n + i) for i, (x, y) in enumerate(tokenizer.merges)]
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in [*lines, (UNKNOWN_ID, -1, -1, -1)]))
    return youtokentome.BPE(str(path))


@pytest.mark.parametrize(("dropout", "excess"), [(0.1, 0.05), (0.5, 0.02)])
def test_dropout_is_youtokentomes_but_where_merges_exclude_one_another(dropout, excess, tmp_path):
    """The departure that apply_merges describes: an impossible merge gives others another chance."""
    more = []
    for tokenizer, word in ((ONE_TREE, "abcd"), (OVERLAPPING, "token")):
        theirs = to_youtokentome(tokenizer, tmp_path / "model")
        (whole,) = theirs.encode([word])
        share = theirs.encode([word] * N_SAMPLES, dropout_prob=dropout).count(whole) / N_SAMPLES
        ours = exact_dropout_distribution(tokenizer, word, dropout)
        more.append(share - ours[tuple(tokenizer.encode(word))])
    assert abs(more[0]) < 0.04  # 5 standard deviations
    assert more[1] > excess


def test_dropout_depends_on_the_seed_alone(tokenizer):
    def encode(seed):
        return [tokenizer.encode(caption, 0.1, seed) for caption in CAPTIONS[:20]]

    random.seed(3)
    state = random.getstate()
    first = encode((1, 2, 3))
    assert encode((1, 2, 3)) == first
    assert encode(5) == encode((5,))
    assert all(encode(other) != first for other in [(1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3), 1])
    assert random.getstate() == state
    whole = [tokenizer.encode(caption) for caption in CAPTIONS[:20]]
    assert [*map(tokenizer.decode, first)] == [*map(tokenizer.decode, whole)]


def test_full_dropout_gives_letters_and_a_wrong_dropout_is_refused(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("red", 1.0, seed=0)] == ["", "r", "e", "d"]
    with pytest.raises(ValueError, match="give a seed"):
        tokenizer.encode("red", dropout=0.1)
    for dropout in [-0.1, 1.1, float("nan")]:
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            tokenizer.encode("red", dropout, seed=0)


# Training.


def test_training_again_gives_the_same_merges_where_no_counts_are_equal():
    captions = ["a", *["ab"] * 2, *["abc"] * 4]  # (mark, a) 7 times, (a, b) 6 times, (b, c) 4 times
    config = TextTokenizerConfig(1 + N_BYTES + 4 + 3)
    first = train_text_tokenizer(captions, config)
    assert [first.decode([i]) for i in range(first.vocab_size - 3, first.vocab_size)] == ["a", "ab", "abc"]
    for _ in range(10):
        assert train_text_tokenizer(iter(captions[::-1]), config).hash == first.hash


def test_few_captions_give_a_smaller_vocabulary():
    tokenizer = train_text_tokenizer(["ab ab"], TextTokenizerConfig())
    assert tokenizer.vocab_size == 1 + N_BYTES + 3 + 2  # mark, a, b; two merges make the word
    assert len(tokenizer.encode("ab")) == 1


def test_nothing_to_train_on():
    for captions in ([], [""], [" ", "\n"]):
        with pytest.raises(ValueError, match="nothing to train on"):
            train_text_tokenizer(captions)
    with pytest.raises(TypeError, match="in a list"):
        train_text_tokenizer("a red star")


@pytest.mark.parametrize(("byte_fallback", "needed"), [(True, 260), (False, 4)])
def test_a_vocabulary_too_small_names_the_minimum(byte_fallback, needed):
    for vocab_size, least in ((1, ""), (2, ""), (needed - 1, f".*need at least {needed} ids")):
        with pytest.raises(ValueError, match=f"too small{least}"):
            train_text_tokenizer(["ab"], TextTokenizerConfig(vocab_size, byte_fallback))
    assert train_text_tokenizer(["ab"], TextTokenizerConfig(needed, byte_fallback)).vocab_size == needed


def test_character_coverage_leaves_rare_characters_to_bytes():
    captions = ["a red star"] * 1000 + ["ж"]
    rare = train_text_tokenizer(captions, TextTokenizerConfig(300))
    kept = train_text_tokenizer(captions, TextTokenizerConfig(300, character_coverage=1.0))
    assert "ж" not in rare.characters
    assert "ж" in kept.characters
    assert rare.decode(rare.encode("ж")) == kept.decode(kept.encode("ж")) == "ж"


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 0}, {"vocab_size": 400.5}, {"byte_fallback": None}, {"character_coverage": 0}]
)
def test_config_refuses(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        TextTokenizerConfig(**fields)


# Files and checkpoints.


def test_a_change_changes_the_hash(tokenizer):
    data = tokenizer.to_dict()
    assert TextTokenizer.from_dict(data).hash == tokenizer.hash
    assert TextTokenizer.from_dict(data | {"merges": data["merges"][:-1]}).hash != tokenizer.hash


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text_tokenizer.json"
    tokenizer.save(path)
    assert os.listdir(tmp_path) == [path.name]
    path.write_text("old")
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "expected the format"),
        ({"version": 99}, "in version 1"),
        ({"merges": None}, "damaged"),
        ({"config": {"vocab_size": 390, "vocab": 1}}, "damaged"),
        ({"characters": "ab"}, "the alphabet"),
        ({"characters": f"{WORD_START}aa"}, "the alphabet"),
        ({"merges": [[9999, 260]]}, "merge 0 joins"),
        ({"merges": [[5, 260]]}, "merge 0 joins"),
        ({"config": {"vocab_size": 389}}, "more than the vocab_size"),
    ],
)
def test_a_damaged_file_is_refused(tokenizer, tmp_path, changes, message):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(tokenizer.to_dict() | changes))
    with pytest.raises(ValueError, match=rf"other\.json is not a text tokenizer: .*{message}"):
        load_text_tokenizer(path)


def test_training_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "youtokentome", None)
    with pytest.raises(ImportError, match="pip install --no-build-isolation youtokentome"):
        train_text_tokenizer(["a"])


def test_training_prints_nothing(capfd):
    train_text_tokenizer(["a red circle", "a blue square"] * 3, TextTokenizerConfig(300))
    assert capfd.readouterr() == ("", "")
    os.write(2, b"printed again")
    assert capfd.readouterr().err == "printed again"
