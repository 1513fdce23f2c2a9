"""Captions in other alphabets go through the whole chain by the byte fallback: tokenizer, cache, training, drawing.

The vocabulary is that of the shapes, which has English letters only, so every other letter is spelt in bytes.
"""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dalle.data import TokenCache
from dalle.models import load_part
from dalle.pipeline import DALLE
from dalle.stages.encode import encode_images
from dalle.stages.transformer import train_transformer
from dalle.text import TextTokenizer
from dalle.text.bpe import FIRST_BYTE_ID, normalize

CAPTIONS = {
    "chinese": "白色背景上的红色圆形在左边",
    "cyrillic": "Красный круг над синим квадратом",
    "emoji": "🔴 over 🟦 👩\u200d🚀 🇩🇪",
    "arabic": "دائرة حمراء على خلفية بيضاء",
    "hebrew": "עיגול אדום mixed with English",
}


@pytest.fixture(scope="module")
def world(chain, tiny_runs, tmp_path_factory):
    """A model that took two steps on twenty pictures with these captions, and their cache."""
    out = tmp_path_factory.mktemp("world")
    (out / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for n in range(20):
        name, caption = list(CAPTIONS.items())[n % len(CAPTIONS)]
        Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(out / "pictures" / f"{name}{n}.png")
        (out / "pictures" / f"{name}{n}.txt").write_text(caption, encoding="utf-8")
    data = replace(tiny_runs.encode.data, path=str(out / "pictures"), held_out=1e-9, workers=0)
    encode_images(replace(tiny_runs.encode, out=out / "tokens", dvae=chain / "dvae", data=data))
    run = replace(tiny_runs.transformer, model=replace(tiny_runs.transformer.model, text_len=80))
    train_transformer(replace(run, out=out / "transformer", tokens=out / "tokens", tokenizer=chain / "text"))
    return out


@pytest.fixture(scope="module")
def model(world, chain) -> DALLE:
    return DALLE.from_parts(load_part(chain / "dvae", "dvae"), load_part(world / "transformer", "transformer"), None)


def test_the_cache_holds_the_captions_as_they_were(world):
    cache = TokenCache(world / "tokens")
    assert {text for texts in cache.captions(range(cache.size)) for text in texts} == set(CAPTIONS.values())


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_letter_is_kept(chain, name):
    text = TextTokenizer.load(chain / "text" / "text.json")
    caption = CAPTIONS[name]
    ids = text.encode(caption)
    letters = "".join(normalize(caption))
    spelt = sum(FIRST_BYTE_ID <= token < FIRST_BYTE_ID + 256 for token in ids)
    assert spelt == sum(len(letter.encode()) for letter in letters if letter not in text.characters) > 0
    assert text.decode(ids).replace(" ", "") == letters
    assert text.encode(text.decode(ids)) == ids


@pytest.mark.parametrize("name", CAPTIONS)
def test_a_picture_is_drawn(model, name):
    """And the model was given the whole caption, in the order in which it is read."""
    (tokens,) = model.text_tokens([CAPTIONS[name]]).tolist()
    own = [token for token in tokens if token < model.transformer.layout.text_vocab]
    assert model.text.decode(own).replace(" ", "") == "".join(normalize(CAPTIONS[name]))
    drawn = model.generate(CAPTIONS[name], n=1, best_of=1, progress=False)
    assert drawn.images[0].size == (32, 32)
    assert drawn.prompt == CAPTIONS[name]
