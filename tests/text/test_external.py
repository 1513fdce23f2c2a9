"""Tokenizers of other libraries: their ids are those of the library, and damaged files are refused."""

import json
import pickle
import random
import sys
import unicodedata

import pytest
import youtokentome

from dalle.text import TextTokenizer, TextTokenizerConfig, load_text_tokenizer, text_tokenizer_from_dict
from dalle.text.external.huggingface import HuggingFaceTokenizer
from dalle.text.external.youtokentome import YoutokentomeTokenizer, parse_model
from tests.helpers.text_tokenizers import CAPTIONS, HUGGING_FACE, train_hugging_face, train_youtokentome

AWKWARD = [
    *map(chr, range(9, 127)),
    *"\x85\xa0\u2028\u3000é\u0301İΣςß\uff46ﬁ①½\u200d\u200c\u093eह中жك\ufeff\u2581_٣👩🇩🇪",
]
RNG = random.Random(0)
RANDOM_STRINGS = ["".join(RNG.choices(AWKWARD, k=RNG.randrange(1, 30))) for _ in range(1500)]
LETTERS = [
    f"a{letter}b {letter}{letter}"
    for letter in map(chr, [*range(32, 0xD800, 7), *range(0xE000, 0x10000, 7), *range(0x1F000, 0x1FA00, 7)])
    if unicodedata.category(letter) != "Cn"
]
TEXTS = [*CAPTIONS, *RANDOM_STRINGS, *LETTERS, "", " ", "\n"]


class TestHuggingFace:
    @pytest.mark.parametrize("name", HUGGING_FACE)
    def test_ids_are_those_of_the_library(self, name):
        theirs, data = train_hugging_face(name)
        ours = HuggingFaceTokenizer(data)
        assert ours.vocab_size == theirs.get_vocab_size()
        for text, expected in zip(TEXTS, theirs.encode_batch(TEXTS, add_special_tokens=False), strict=True):
            assert ours.encode(text) == expected.ids, ascii(text)

    @pytest.mark.parametrize(
        "name", ["words", "words with suffix", "GPT-2", "CLIP", "Llama 3", "Llama 2", "Metaspace"]
    )
    def test_decoding(self, name):
        ours = HuggingFaceTokenizer(train_hugging_face(name)[1])
        for caption in CAPTIONS[::17]:
            decoded = ours.decode(ours.encode(caption))
            expected = caption.lower() if name == "CLIP" else caption
            assert decoded.replace(" ", "") == expected.replace(" ", "")
            assert len(decoded.split()) >= len(caption.split())
        if name in ("GPT-2", "Llama 2", "Metaspace"):
            assert ours.decode(ours.encode(CAPTIONS[1])) == CAPTIONS[1]

    def test_decoding_of_unknown_characters(self):
        words = HuggingFaceTokenizer(train_hugging_face("words")[1])
        assert words.decode(words.encode("red ☃ star")) == "red \ufffd s t a r"
        byte_fallback = HuggingFaceTokenizer(train_hugging_face("Llama 2")[1])
        assert byte_fallback.decode(byte_fallback.encode("red ☃")) == "red ☃"

    def test_a_special_token_in_a_caption_is_text(self):
        theirs, data = train_hugging_face("words")
        unknown = data["model"]["vocab"]["[UNK]"]
        assert theirs.encode("red [UNK]", add_special_tokens=False).ids[-1] == unknown
        assert len(HuggingFaceTokenizer(data).encode("red [UNK]")) > 2
        special = [{"id": 3, "content": "<s>", "special": True}]
        assert HuggingFaceTokenizer({"model": BPE, "added_tokens": special}).decode([3, 0, 3, 1, 3]) == "a b"

    def test_dropout_is_seeded(self):
        ours = HuggingFaceTokenizer(train_hugging_face("GPT-2")[1])
        assert len(ours.encode("photograph", 1.0, 0)) == 10
        lengths = {len(ours.encode("photograph", 0.5, seed)) for seed in range(20)}
        assert 1 < min(lengths) + 1 < max(lengths) < 11
        assert ours.encode("photograph", 0.5, 3) == ours.encode("photograph", 0.5, 3)

    @pytest.mark.parametrize("merges", [["a b"], [["a", "b"]]])
    def test_merges_as_strings_and_as_pairs(self, merges):
        assert HuggingFaceTokenizer({"model": BPE | {"merges": merges}}).encode("aab") == [0, 2]

    def test_without_tokenizers_the_package_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match="pip install tokenizers"):
            HuggingFaceTokenizer({"model": BPE})


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
SPLIT = {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"model": BPE | {"continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": BPE | {"dropout": 0.1}}, "dropout"),
        ({"model": BPE | {"merges": ["a c"]}}, "merge 0, .* needs 'c'"),
        ({"model": BPE | {"vocab": [1]}}, "damaged"),
        ({"model": BPE | {"vocab": {"a": "0"}}}, "numbered from 0"),
        ({"model": BPE | {"vocab": {"a": -3}, "merges": []}}, "numbered from 0"),
        ({"model": BPE | {"merges": None}}, "damaged"),
        ({"model": BPE | {"merges": ["a b c"]}}, "merge 0 .* is not of two tokens"),
        ({"model": BPE | {"merges": [1]}}, "damaged"),
        ({"model": BPE | {"unk_token": "zz"}}, "damaged"),
        ({"model": BPE | {"end_of_word_suffix": 3}}, "no text"),
        ({"normalizer": "x"}, "normalizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled"}]}}, "'Precompiled'"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "often"}}, "often"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "("}}}, "parenthesis"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Glob": "*"}}}, "Glob"),
        ({"pre_tokenizer": SPLIT | {"behavior": "Sometimes"}}, "Sometimes"),
        ({"added_tokens": [{"id": 3, "content": "Pikachu", "special": False}]}, "Pikachu"),
    ],
)
def test_an_unsupported_or_damaged_tokenizer_json_is_refused(tmp_path, changes, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": BPE, **changes}))
    with pytest.raises(ValueError, match=rf"tokenizer\.json is not a text tokenizer: .*{message}"):
        load_text_tokenizer(path)


class TestYoutokentome:
    @pytest.mark.parametrize("special", [{}, {"unk_id": 5, "pad_id": 2, "bos_id": 1, "eos_id": 0}])
    def test_ids_are_those_of_youtokentome(self, special, tmp_path):
        file = train_youtokentome(tmp_path, **special)
        theirs = youtokentome.BPE(str(file))
        ours = load_text_tokenizer(file)
        assert isinstance(ours, YoutokentomeTokenizer)
        assert ours.vocab_size == theirs.vocab_size()
        for text, expected in zip(TEXTS, theirs.encode(TEXTS), strict=True):
            assert ours.encode(text) == expected, ascii(text)
        for ids in theirs.encode(CAPTIONS):
            assert ours.decode(ids) == theirs.decode([ids])[0]
        assert ours.decode(ours.encode("a ☃☃ star")) == "a \ufffd star"
        for end in (0, 1, 5, -1):
            (tmp_path / "part").write_text("\n".join(file.read_text().splitlines()[:end]))
            with pytest.raises(ValueError, match=r"part is not a text tokenizer"):
                load_text_tokenizer(tmp_path / "part")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1 1\n97 1\n1 1 2\n0 -1 -1 -1", "word-start mark"),
            ("1 1\n9601 1\n1 7 2\n0 -1 -1 -1", "joins 1 and 7"),
            ("1 0\n97 1\n0 -1", "expected"),
            ("1 0\n-5 1\n0 -1 -1 -1", "expected"),
        ],
    )
    def test_a_damaged_model_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            YoutokentomeTokenizer(parse_model(text))


@pytest.fixture(params=["hugging face", "youtokentome", "own"])
def any_tokenizer(request):
    if request.param == "hugging face":
        return HuggingFaceTokenizer(train_hugging_face("CLIP")[1])
    if request.param == "youtokentome":
        return YoutokentomeTokenizer(parse_model("3 1\n9601 4\n97 5\n98 6\n5 6 7\n1 0 2 3"))
    return TextTokenizer(TextTokenizerConfig(), "\u2581ab", [(258, 259)])


def test_copies_through_a_file_a_checkpoint_and_a_pickle(any_tokenizer, tmp_path):
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
    with pytest.raises(ValueError, match=r"expected the format .* in version 1"):
        type(any_tokenizer).from_dict({"format": "something"})


def test_wrong_tokens_and_captions_are_named(any_tokenizer):
    with pytest.raises(ValueError, match="at position 0 is not in 0"):
        any_tokenizer.decode([any_tokenizer.vocab_size])
    with pytest.raises(TypeError, match="a caption must be a str, not NoneType"):
        any_tokenizer.encode(None)


@pytest.mark.parametrize(
    "content", ["", "hello", "[]", "{}", '{"format": "huggingface-bpe", "version": 9}', "\x00", "[" * 10**5]
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "other").write_text(content)
    with pytest.raises(ValueError, match="other is not a text tokenizer"):
        load_text_tokenizer(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.json"):
        load_text_tokenizer(tmp_path / "nothing.json")
