"""Captions in other scripts (in bytes, for the vocabulary is English), and tokenizers of other libraries."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.commands.encode_images import encode_images
from dalle.commands.train_clip import train_clip
from dalle.commands.train_tokenizer import train_tokenizer
from dalle.commands.train_transformer import train_transformer
from dalle.data import TokenCache
from dalle.hub.registry import load_model
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.text import load_text_tokenizer
from dalle.text.tokenizer import FIRST_BYTE_ID, normalize
from tests.helpers.scenes import put
from tests.helpers.text_tokenizers import train_hugging_face, train_youtokentome

CAPTIONS = {
    "chinese": "白色背景上的红色圆形在左边",
    "cyrillic": "Красный круг над синим квадратом",
    "emoji": "🔴 over 🟦 👩\u200d🚀 🇩🇪",
    "arabic": "دائرة حمراء على خلفية بيضاء",
    "hebrew": "עיגול אדום mixed with English",
}


def train_both(runs, out, text, tokens, data=None, **sizes):
    """Two steps of a transformer and of a CLIP with this tokenizer and sizes."""
    options = {"text_tokenizer": text}
    model = replace(runs.transformer.model, **sizes)
    train_transformer(
        replace(runs.transformer, model=model, out=out / "transformer", tokens=tokens, **options)
    )
    model = replace(runs.clip.model, **sizes)
    train_clip(replace(runs.clip, model=model, out=out / "clip", data=data or runs.clip.data, **options))


def join(chain, out) -> DALLE:
    folders = {"dvae": chain / "dvae", "transformer": out / "transformer", "clip": out / "clip"}
    return DALLE.from_parts(*(load_model(folder, kind) for kind, folder in folders.items()))


@pytest.fixture(scope="module")
def world(chain, tiny_runs, tmp_path_factory):
    """A model that took two steps on twenty images with these captions, and their cache."""
    out = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for n in range(20):
        image = Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8))
        put(out / "images", f"{n}.png", image, list(CAPTIONS.values())[n % len(CAPTIONS)])
    data = replace(tiny_runs.encode.data, path=str(out / "images"), val_fraction=1e-9, workers=0)
    encode_images(replace(tiny_runs.encode, out=out / "tokens", dvae=chain / "dvae", data=data))
    train_both(
        tiny_runs, out, chain / "text", out / "tokens", text_len=80, data=replace(data, val_path=data.path)
    )
    train_tokenizer(replace(tiny_runs.text, out=out / "text", data=data))
    return out


@pytest.fixture(scope="module")
def model(world, chain) -> DALLE:
    return join(chain, world)


def test_the_cache_holds_the_captions_as_they_were(world):
    cache = TokenCache(world / "tokens")
    assert {text for texts in cache.captions(range(cache.size)) for text in texts} == set(CAPTIONS.values())


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_letter_is_kept_in_bytes_unless_the_vocabulary_was_trained_on_it(chain, world, name):
    letters = "".join(normalize(CAPTIONS[name]))
    for folder, unknown in ((chain / "text", True), (world / "text", False)):
        text = load_text_tokenizer(folder / "text_tokenizer.json")
        ids, missing = text.encode(CAPTIONS[name]), [one for one in letters if one not in text.characters]
        in_bytes = sum(FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256 for token in ids)
        assert in_bytes == len("".join(missing).encode())
        assert bool(missing) == unknown
        assert text.decode(ids).replace(" ", "") == letters
        assert text.encode(text.decode(ids)) == ids
    assert read_json(world / "text" / "report.json")["coverage"] == 1


@pytest.mark.parametrize("name", CAPTIONS)
def test_images_are_generated_and_ranked(model, name):
    (tokens,) = model.text_tokens([CAPTIONS[name]]).tolist()
    own = [token for token in tokens if token < model.transformer.layout.text_vocab]
    assert model.text.decode(own).replace(" ", "") == "".join(normalize(CAPTIONS[name]))
    generated = model.generate(CAPTIONS[name], n=2, best_of=2, progress=False)
    assert [image.size for image in generated.images] == [(32, 32)] * 2
    assert generated.prompt == CAPTIONS[name]
    first, second = generated.scores
    assert first >= second


def test_clip_scores_depend_on_every_letter(model):
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [CAPTIONS["arabic"], CAPTIONS["arabic"].replace("حمراء", "زرقاء"), CAPTIONS["chinese"]]
    assert len({float(model.scorer.score(pixels, text)) for text in texts}) == 3


@pytest.mark.filterwarnings("ignore:the vocabulary lacks letters")
@pytest.mark.parametrize("library", ["hugging face", "youtokentome"])
def test_a_model_holds_its_tokenizer_of_another_library(library, chain, tiny_runs, tmp_path):
    if library == "youtokentome":
        file = train_youtokentome(tmp_path)
    else:
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(train_hugging_face("CLIP")[1]), encoding="utf-8")
    text = load_text_tokenizer(file)
    train_both(tiny_runs, tmp_path, file, chain / "tokens", text_len=80, text_vocab=720)
    join(chain, tmp_path).save_pretrained(tmp_path / "model")
    file.unlink()  # the model directory holds its own
    model = DALLE.from_pretrained(tmp_path / "model")
    assert type(model.text) is type(text)
    assert model.text.hash == text.hash
    prompt = "A red circle under a dog's bowl, красная 红色的圆 كرة حمراء 🔴"
    (tokens,) = model.text_tokens([prompt]).tolist()
    assert [token for token in tokens if token < 720] == text.encode(prompt)
    assert len(model.generate(prompt, n=1, best_of=2, progress=False).scores) == 1
