"""Tokenizers of other libraries through the chain: trained on, kept with the model, drawn and ranked with."""

import json
from dataclasses import replace

import pytest

from dalle.commands.train_clip import train_clip
from dalle.commands.train_transformer import train_transformer
from dalle.hub.registry import load_model
from dalle.pipelines.dalle import DALLE
from dalle.text import load_text_tokenizer
from tests.text.test_external import CAPTIONS, HELD, train_huggingface

PROMPT = "A red circle under a dog's bowl, красная 红色的圆 كرة حمراء 🔴"


@pytest.fixture(params=["huggingface", "youtokentome"])
def foreign(request, tmp_path):
    """The file that another library wrote."""
    if request.param == "huggingface":
        (tmp_path / "tokenizer.json").write_text(
            json.dumps(train_huggingface(*HELD["CLIP"])[1]), encoding="utf-8"
        )
        return tmp_path / "tokenizer.json"
    youtokentome = pytest.importorskip("youtokentome")
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    youtokentome.BPE.train(
        data=str(tmp_path / "captions.txt"), model=str(tmp_path / "bpe.model"), vocab_size=200
    )
    return tmp_path / "bpe.model"


@pytest.mark.filterwarnings("ignore:the vocabulary lacks letters")
def test_a_model_is_trained_with_a_foreign_tokenizer_and_keeps_it(foreign, chain, tiny_runs, tmp_path):
    runs = {
        "transformer": replace(tiny_runs.transformer, tokens=chain / "tokens"),
        "clip": tiny_runs.clip,
    }
    for (kind, run), train in zip(runs.items(), (train_transformer, train_clip), strict=True):
        model = replace(run.model, text_len=80, text_vocab=720)
        train(replace(run, model=model, text_tokenizer=foreign, out=tmp_path / kind))
    places = {"dvae": chain / "dvae", "transformer": tmp_path / "transformer", "clip": tmp_path / "clip"}
    DALLE.from_parts(*(load_model(place, kind) for kind, place in places.items())).save_pretrained(
        tmp_path / "model"
    )
    text = load_text_tokenizer(foreign)
    foreign.unlink()  # the model holds what it needs
    model = DALLE.from_pretrained(tmp_path / "model")
    assert type(model.text) is type(text)
    assert model.text.hash == text.hash
    (tokens,) = model.text_tokens([PROMPT]).tolist()
    assert [token for token in tokens if token < 720] == text.encode(PROMPT)
    drawn = model.generate(PROMPT, n=1, best_of=2, progress=False)
    assert drawn.images[0].size == (32, 32)
    assert len(drawn.scores) == 1
