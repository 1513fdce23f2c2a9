"""Formats: what an older version wrote opens here, what a later one wrote is refused; tests/format_3 is such a model.

That directory was written when FORMAT was 3, of untrained weights, and its images were drawn then.
"""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest

from dalle.hub.registry import load_model
from dalle.io import format as migrations
from dalle.io.files import read_json
from dalle.io.format import FORMAT, MIGRATIONS, check_meta, read_config
from dalle.pipelines.dalle import DALLE

OLD = Path(__file__).parent / "format_3"
HASH = "2018ed2b59490401-24ca4421da7189b9-810e89f48ec0be6b"
CAPTION = "a red circle above a blue square on a white background"
DRAWN = [[7, 7, 6, 0, 0, 5, 7, 2, 5], [4, 5, 7, 0, 1, 4, 4, 0, 3]]
SCORES = [0.90637, 0.90484]


def test_a_model_of_format_3_draws_what_it_drew_then():
    assert read_json(OLD / "config.json")["format"] == 3
    model = DALLE.from_pretrained(OLD)
    generation = model.generate(CAPTION, n=2, best_of=4, seed=5, progress=False)
    assert model.hash == HASH
    assert generation.image_tokens.tolist() == DRAWN
    assert generation.scores == pytest.approx(SCORES, abs=1e-4)


def test_saved_again_it_has_the_present_format(tmp_path):
    DALLE.from_pretrained(OLD).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["format"] == FORMAT
    assert check_meta(read_json(OLD / "config.json"), "dalle", OLD) == config


def test_the_hash_of_a_part_of_format_3_is_checked(tmp_path):
    shutil.copytree(OLD, tmp_path / "model")
    config = read_json(OLD / "config.json")
    config["hash"] = config["hash"].replace("24ca", "24cb")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "model", "dvae").hash == HASH.split("-")[0]
    with pytest.raises(
        ValueError, match=r"transformer\.safetensors: the weights have hash 24ca.*, expected 24cb"
    ):
        load_model(tmp_path / "model", "transformer")


def test_a_description_goes_through_every_step_and_stays_as_it_was():
    assert sorted(MIGRATIONS) == list(range(min(MIGRATIONS), FORMAT))
    old = {
        "format": 2,
        "kind": "dalle",
        "hash": "a-b",
        "links": {},
        "parts": {"dvae": {}, "transformer": {"config": 1}},
    }
    kept = deepcopy(old)
    assert check_meta(old, "dalle", OLD) == {
        "format": FORMAT,
        "kind": "dalle",
        "links": {},
        "parts": {"dvae": {"hash": "a"}, "transformer": {"config": 1, "hash": "b"}},
    }
    assert old == kept


def test_a_checkpoint_keeps_all_but_its_number():
    meta = {"format": 2, "kind": "dvae", "step": 3, "links": {"data": "x"}}
    assert check_meta(meta, "dvae", OLD) == meta | {"format": FORMAT}


def test_steps_follow_one_another(monkeypatch):
    monkeypatch.setattr(migrations, "FORMAT", 6)
    monkeypatch.setitem(MIGRATIONS, 4, lambda meta: meta | {"trail": [*meta["trail"], 4]})
    monkeypatch.setitem(MIGRATIONS, 5, lambda meta: meta | {"trail": [*meta["trail"], 5]})
    assert check_meta({"format": 4, "kind": "clip", "trail": []}, "clip", OLD)["trail"] == [4, 5]
    assert check_meta({"format": 5, "kind": "clip", "trail": []}, "clip", OLD)["trail"] == [5]


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        (
            {"kind": "clip", "format": FORMAT + 1},
            "a later version of this library wrote it; update the library",
        ),
        (
            {"kind": "clip", "format": 1},
            "has format 1, this version reads 2 to .*use the version that wrote it",
        ),
        ({"kind": "clip"}, "has format None"),
        ({"kind": "clip", "format": "4"}, "has format .4., this version reads 2 to"),
        ({"kind": "clip", "format": True}, "has format True"),
        ({"kind": "dvae", "format": FORMAT}, "holds 'dvae', expected 'clip'"),
        ([], "holds 'something unknown', expected 'clip'"),
        (
            {"kind": "clip", "format": FORMAT, "links": [], "config": 3},
            "said of its config and links is damaged",
        ),
    ],
)
def test_what_cannot_be_read_is_told(meta, said):
    with pytest.raises(ValueError, match=said):
        check_meta(meta, "clip", OLD)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parts": None}, "lacks parts"),
        ({"links": []}, "lacks links"),
        ({"parts": {}}, "names no parts"),
        ({"parts": {"dvae": 1}}, "tells nothing of dvae"),
        ({"parts": {"/elsewhere/secret": {}}}, "names parts that cannot be, '/elsewhere/secret'"),
        ({"parts": {"dvae": {}, "../secret": {}}}, "names parts that cannot be, '../secret'"),
        ({"parts": {"dvae": {}}}, "lacks the config or the hash of dvae"),
        (
            {"format": 4, "parts": {"dvae": {"config": 3, "hash": "x"}}},
            "lacks the config or the hash of dvae",
        ),
        (
            {"format": 4, "parts": {"dvae": {"config": {"a": 1}, "hash": 3}}},
            "lacks the config or the hash of dvae",
        ),
        ({"format": 4}, "lacks the config or the hash of dvae, transformer, clip"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, said):
    (tmp_path / "config.json").write_text(json.dumps(read_json(OLD / "config.json") | change))
    with pytest.raises(ValueError, match=rf"config\.json {said}; it is damaged"):
        read_config(tmp_path)


def test_a_config_of_something_else_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ValueError, match="holds 'something unknown', expected 'dalle'"):
        read_config(tmp_path)
