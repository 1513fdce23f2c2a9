"""Tokenizers of other libraries, held exactly: dalle/text/{readers,huggingface,splitting,youtokentome}.py.

Each is trained here by its own library and must give the ids that the library gives, on captions like those
it was trained on, on random strings of awkward letters, and on every letter of the planes in use.
"""

import json
import pickle
import random
import sys
import unicodedata
from itertools import product

import pytest

from dalle.text import (
    BPETokenizer,
    TextTokenizer,
    TextTokenizerConfig,
    load_text_tokenizer,
    text_tokenizer_from_dict,
)
from dalle.text.external.huggingface import HuggingFaceTokenizer
from dalle.text.external.pre_tokenizers import byte_letters, normalizer, splitter
from dalle.text.external.youtokentome import YoutokentomeTokenizer, parse_model

COLORS, SHAPES = ["red", "green", "blue", "yellow"], ["circle", "square", "photograph"]
PLACES = [
    "under a dog's bowl",
    "(seen from above)",
    "in 1984, of 3.5 m",
    " красная собака",
    "红色的圆 在左边",
    "كرة حمراء",
]
CAPTIONS = [f"A {c} {s} {p}, the {c2}-{s}!" for c, s, p, c2 in product(COLORS, SHAPES, PLACES, COLORS)]
AWKWARD = [
    *map(chr, range(9, 127)),
    *"\x85\xa0\u2028\u3000é\u0301İΣςß\uff46ﬁ①½\u200d\u200c\u093eह中жك\ufeff\u2581_٣👩🇩🇪",
]
LETTERS = [
    f"a{letter}b {letter}{letter}"
    for letter in map(chr, [*range(32, 0xD800, 7), *range(0xE000, 0x10000, 7), *range(0x1F000, 0x1FA00, 7)])
    if unicodedata.category(letter) != "Cn"  # libraries disagree about letters newer than they are
]


def random_strings(count=1500):
    rng = random.Random(0)
    return ["".join(rng.choices(AWKWARD, k=rng.randrange(1, 30))) for _ in range(count)]


# Hugging Face.

CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(**options):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
        **options,
    }


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


WHITESPACE = {"type": "Whitespace"}
UNKNOWN = {"unk_token": "[UNK]"}
HELD = {
    "words": (None, WHITESPACE, UNKNOWN),
    "words, unknowns fused": (None, WHITESPACE, {**UNKNOWN, "fuse_unk": True}),
    "words, unknowns dropped": (None, WHITESPACE, {}),
    "words with suffix": (None, WHITESPACE, {**UNKNOWN, "end_of_word_suffix": "</w>"}),
    "lowercased": ({"type": "Lowercase"}, {"type": "WhitespaceSplit"}, UNKNOWN),
    "NFD": ({"type": "NFD"}, WHITESPACE, UNKNOWN),
    "GPT-2": (None, byte_level(), {}),
    "RoBERTa": (None, byte_level(add_prefix_space=True), {}),
    "CLIP": (
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        sequence(split({"Regex": CLIP_WORDS}, "Removed", True), byte_level()),
        {**UNKNOWN, "end_of_word_suffix": "</w>"},
    ),
    "Llama 3": (
        None,
        sequence(split({"Regex": LLAMA_WORDS}), byte_level(use_regex=False)),
        {"ignore_merges": True},
    ),
    "Llama 2": (
        {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        None,
        {**UNKNOWN, "fuse_unk": True, "byte_fallback": True},
    ),
    "Metaspace": (
        None,
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        UNKNOWN,
    ),
    "Metaspace first": (
        None,
        {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        UNKNOWN,
    ),
    "digits and punctuation": (
        None,
        sequence(
            {"type": "WhitespaceSplit"},
            {"type": "Punctuation", "behavior": "Contiguous"},
            {"type": "Digits", "individual_digits": True},
        ),
        UNKNOWN,
    ),
    **{
        f"split {behavior} {invert}": (None, split({"Regex": "[aeiou ]"}, behavior, invert), UNKNOWN)
        for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        for invert in (False, True)
    },
    **{
        f"BERT {name}": (
            {
                "type": "BertNormalizer",
                "clean_text": clean,
                "handle_chinese_chars": chinese,
                "strip_accents": accents,
                "lowercase": lower,
            },
            {"type": "BertPreTokenizer"},
            {**UNKNOWN, "end_of_word_suffix": "</w>"},
        )
        for name, clean, chinese, accents, lower in (
            ("by default", True, True, None, True),
            ("cased", True, True, None, False),
            ("without accents", False, True, True, False),
            ("untouched", False, False, False, False),
        )
    },
    "split at a string": (None, split({"String": "."}, "MergedWithNext"), UNKNOWN),
}


def train_huggingface(normalize, pre_tokenizer, model):
    """A tokenizer.json, trained by its own library, as (library's, data)."""
    tokenizers = pytest.importorskip("tokenizers")
    options = {name: value for name, value in model.items() if name != "byte_fallback"}
    empty = tokenizers.Tokenizer(tokenizers.models.BPE(**options))
    data = json.loads(empty.to_str()) | {"normalizer": normalize, "pre_tokenizer": pre_tokenizer}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    special = ["[UNK]"] * ("unk_token" in model)
    special += [f"<0x{byte:02X}>" for byte in range(256)] * bool(model.get("byte_fallback"))
    kinds = [
        part["type"] for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": ""}])
    ]
    alphabet = byte_letters() if "ByteLevel" in kinds else []
    suffix = {"end_of_word_suffix": "</w>"} if "end_of_word_suffix" in model else {}
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **suffix
    )
    theirs.train_from_iterator(CAPTIONS, trainer)
    data = json.loads(theirs.to_str())
    data["model"]["byte_fallback"] = model.get("byte_fallback", False)
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(data)), data


def settled(letter):
    """Whether it was there before the tables of BERT's parts were made, and was not counted otherwise
    since."""
    return unicodedata.ucd_3_2_0.category(letter) != "Cn" and letter not in "\u166d\u1734\u1885\u1886"


@pytest.mark.parametrize("name", HELD)
def test_ids_are_those_of_the_library(name):
    theirs, data = train_huggingface(*HELD[name])
    ours = HuggingFaceTokenizer(data)
    assert ours.vocab_size == theirs.get_vocab_size()
    letters = [text for text in LETTERS if not name.startswith("BERT") or settled(text[1])]
    texts = [*CAPTIONS, *random_strings(), *letters, "", " ", "\n"]
    for text, expected in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        assert ours.encode(text) == expected.ids, ascii(text)


@pytest.mark.parametrize(
    "name", ["words", "words with suffix", "GPT-2", "CLIP", "Llama 3", "Llama 2", "Metaspace"]
)
def test_captions_are_read_back(name):
    ours = HuggingFaceTokenizer(train_huggingface(*HELD[name])[1])
    for caption in CAPTIONS[::17]:
        told = ours.decode(ours.encode(caption))
        same = caption.lower() if name == "CLIP" else caption
        assert told.replace(" ", "") == same.replace(" ", "")
        assert len(told.split()) >= len(caption.split())
    if name in ("GPT-2", "Llama 2", "Metaspace"):
        assert ours.decode(ours.encode(CAPTIONS[1])) == CAPTIONS[1]


def test_letters_outside_the_vocabulary_are_told():
    words = HuggingFaceTokenizer(train_huggingface(*HELD["words"])[1])
    assert words.decode(words.encode("red ☃ star")) == "red \ufffd s t a r"
    spelt = HuggingFaceTokenizer(train_huggingface(*HELD["Llama 2"])[1])
    assert spelt.decode(spelt.encode("red ☃")) == "red ☃"


def test_a_special_token_in_a_caption_is_text():
    theirs, data = train_huggingface(*HELD["words"])
    ours = HuggingFaceTokenizer(data)
    unknown = data["model"]["vocab"]["[UNK]"]
    assert theirs.encode("red [UNK]", add_special_tokens=False).ids[-1] == unknown
    assert ours.encode("red [UNK]")[-1] == unknown  # "[" is outside the alphabet as well
    assert len(ours.encode("red [UNK]")) > 2


def test_full_dropout_spells_letters_and_some_dropout_some():
    ours = HuggingFaceTokenizer(train_huggingface(*HELD["GPT-2"])[1])
    assert len(ours.encode("photograph", 1.0, 0)) == 10
    lengths = {len(ours.encode("photograph", 0.5, seed)) for seed in range(20)}
    assert 1 < min(lengths) + 1 < max(lengths) < 11
    assert ours.encode("photograph", 0.5, 3) == ours.encode("photograph", 0.5, 3)


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


def test_merges_as_strings_and_as_pairs():
    for merges in (["a b"], [["a", "b"]]):
        assert HuggingFaceTokenizer({"model": {**BPE, "merges": merges}}).encode("aab") == [0, 2]


def test_special_tokens_are_read_back_as_nothing():
    special = [{"id": 3, "content": "<s>", "special": True}]
    assert HuggingFaceTokenizer({"model": BPE, "added_tokens": special}).decode([3, 0, 3, 1, 3]) == "a b"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "a model of type 'WordPiece'; only BPE"),
        ({"model": {"type": "Unigram", "vocab": []}}, "a model of type 'Unigram'; only BPE"),
        ({"model": {**BPE, "continuing_subword_prefix": "##"}}, "continuing_subword_prefix to '##'"),
        ({"model": {**BPE, "dropout": 0.1}}, "dropout to 0.1"),
        ({"model": {**BPE, "merges": ["a c"]}}, "merge 0 of tokenizer.json, 'a c', needs 'c'"),
        ({"normalizer": {"type": "Precompiled"}}, "the normalizer 'Precompiled'"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "StripAccents"}]}},
            "normalizer 'StripAccents'",
        ),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "the pre-tokenizer 'UnicodeScripts'"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "often"}}, "the prepend scheme 'often'"),
        ({"pre_tokenizer": split({"Regex": "("})}, r"the pattern '\(' .* cannot be held"),
        ({"pre_tokenizer": split({"Glob": "*"})}, "the pattern .*Glob.* not held"),
        (
            {"added_tokens": [{"id": 3, "content": "Pikachu", "special": False}]},
            r"adds the words \['Pikachu'\]",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(tmp_path, changes, said):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": BPE, **changes}))
    with pytest.raises(
        ValueError, match=rf"tokenizer\.json is not a text tokenizer that can be read: .*{said}"
    ):
        load_text_tokenizer(path)


def test_a_split_that_is_not_held_is_refused():
    with pytest.raises(ValueError, match="the split behavior 'Sometimes'"):
        splitter(split({"String": "a"}, "Sometimes"))(["banana"])


def test_without_regex_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(ImportError, match="pip install regex"):
        splitter(WHITESPACE)


def test_lowercase_has_no_final_sigma():
    assert normalizer({"type": "Lowercase"})("ΟΔΟΣ") == "οδοσ"


# youtokentome.


@pytest.fixture(scope="module", params=[{}, {"unk_id": 5, "pad_id": 2, "bos_id": 1, "eos_id": 0}])
def youtokentome_file(request, tmp_path_factory):
    """A model that youtokentome wrote, with its usual special ids or with others."""
    youtokentome = pytest.importorskip("youtokentome")
    folder = tmp_path_factory.mktemp("yttm")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    options = {"vocab_size": 200, "coverage": 0.999, "n_threads": 1, **request.param}
    youtokentome.BPE.train(data=str(folder / "captions.txt"), model=str(folder / "bpe.model"), **options)
    return folder / "bpe.model"


def test_ids_are_those_of_youtokentome(youtokentome_file):
    theirs = pytest.importorskip("youtokentome").BPE(str(youtokentome_file))
    ours = load_text_tokenizer(youtokentome_file)
    assert isinstance(ours, YoutokentomeTokenizer)
    assert ours.vocab_size == theirs.vocab_size()
    texts = [*CAPTIONS, *random_strings(), *LETTERS, "", " ", "\n"]
    for text, expected in zip(texts, theirs.encode(texts), strict=True):
        assert ours.encode(text) == expected, ascii(text)
    for ids in theirs.encode(CAPTIONS):
        assert ours.decode(ids) == theirs.decode([ids])[0]
    assert ours.decode(ours.encode("a ☃☃ star")) == "a \ufffd star"


@pytest.mark.parametrize("lines", [0, 1, 5, -1])
def test_a_model_that_breaks_off_is_refused(youtokentome_file, tmp_path, lines):
    (tmp_path / "bpe.model").write_text("\n".join(youtokentome_file.read_text().splitlines()[:lines]))
    with pytest.raises(ValueError, match=r"bpe\.model is not a text tokenizer"):
        load_text_tokenizer(tmp_path / "bpe.model")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 1\n97 1\n1 1 2\n0 -1 -1 -1", "lacks the word-start mark"),
        ("1 1\n9601 1\n1 7 2\n0 -1 -1 -1", "joins 1 and 7"),
        ("1 0\n97 1\n0 -1", "expected the text of a youtokentome model"),
        ("1 0\n-5 1\n0 -1 -1 -1", "expected the text of a youtokentome model"),
    ],
)
def test_a_damaged_model_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        YoutokentomeTokenizer(parse_model(text))


# All of them.


@pytest.fixture(params=["huggingface", "youtokentome", "own"])
def any_tokenizer(request) -> BPETokenizer:
    if request.param == "huggingface":
        return HuggingFaceTokenizer(train_huggingface(*HELD["CLIP"])[1])
    if request.param == "youtokentome":
        return YoutokentomeTokenizer(parse_model("3 1\n9601 4\n97 5\n98 6\n5 6 7\n1 0 2 3"))
    return TextTokenizer(TextTokenizerConfig(), "\u2581ab", [(258, 259)])


def test_each_goes_through_a_file_a_checkpoint_and_another_process(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "text_tokenizer.json")
    copies = [
        load_text_tokenizer(tmp_path / "text_tokenizer.json"),
        text_tokenizer_from_dict(json.loads(json.dumps(any_tokenizer.to_dict()))),
        pickle.loads(pickle.dumps(any_tokenizer)),
    ]
    for copy in copies:
        assert type(copy) is type(any_tokenizer)
        assert copy.hash == any_tokenizer.hash
        assert copy.encode("ab ba", 0.5, 1) == any_tokenizer.encode("ab ba", 0.5, 1)


def test_each_names_a_token_out_of_range_and_a_caption_that_is_none(any_tokenizer):
    with pytest.raises(ValueError, match="at position 0 is not in the vocabulary"):
        any_tokenizer.decode([any_tokenizer.vocab_size])
    with pytest.raises(TypeError, match="a caption must be a str, not NoneType"):
        any_tokenizer.encode(None)


DAMAGED = {
    "vocabulary": {"vocab": [1]},
    "no ids": {"vocab": {"a": "0"}},
    "ids below 0": {"vocab": {"a": -3}, "merges": []},
    "merges": {"merges": None},
    "a merge": {"merges": [1]},
    "unknown": {"unk_token": "zz"},
    "suffix": {"end_of_word_suffix": 3},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_json_is_named(tmp_path, name):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    for data in ({"model": model | DAMAGED[name]}, {"model": model, "normalizer": "x"}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a text tokenizer that can be read"):
            load_text_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content", ["", "hello", "[]", "{}", '{"format": "huggingface-bpe", "version": 9}', "\x00", "[" * 10**5]
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_text(content)
    with pytest.raises(ValueError, match="other is not a text tokenizer"):
        load_text_tokenizer(tmp_path / "other")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.json"):
        load_text_tokenizer(tmp_path / "nothing.json")


@pytest.mark.parametrize("kind", [HuggingFaceTokenizer, YoutokentomeTokenizer])
def test_another_version_is_refused(kind):
    with pytest.raises(ValueError, match=r"expected the format .* in version 1"):
        kind.from_dict({"format": "something"})
