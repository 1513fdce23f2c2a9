"""meta.json and config.json: other formats and damaged files are named."""

import json

import pytest

from dalle.io.files import FORMAT, check_meta, read_config

META = {"kind": "dvae", "format": FORMAT, "model_config": {}, "inputs": {}}
PART = {"model_config": {"width": 2}, "hash": "00ff"}
CONFIG = {"kind": "dalle", "format": FORMAT, "inputs": {}, "parts": {"dvae": PART}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "clip"}, "'clip', expected 'dvae'"),
        ({"kind": None}, "unknown"),
        ({"format": FORMAT + 1}, rf"format {FORMAT + 1}, .* reads {FORMAT}; use the version"),
        ({"format": 0}, "format 0"),
        ({"format": None}, "format None"),
        ({"format": True}, "format True"),
        ({"inputs": ["text"]}, "inputs .* damaged"),
    ],
)
def test_bad_meta_is_refused(tmp_path, change, message):
    assert check_meta(META, "dvae", tmp_path) == META
    with pytest.raises(ValueError, match=message):
        check_meta(META | change, "dvae", tmp_path)


@pytest.mark.parametrize("meta", [None, [], "dvae", 3])
def test_meta_that_is_no_object_is_refused(tmp_path, meta):
    with pytest.raises(ValueError, match="unknown"):
        check_meta(meta, "dvae", tmp_path)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"../dvae": PART},
        {"dvae": 3},
        {"dvae": {"hash": "00ff"}},
        {"dvae": PART | {"hash": None}},
        None,
        [],
    ],
    ids=str,
)
def test_bad_parts_are_refused(tmp_path, parts):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert read_config(tmp_path) == CONFIG
    path.write_text(json.dumps(CONFIG | {"parts": parts}))
    with pytest.raises(ValueError, match="damaged"):
        read_config(tmp_path)


def test_a_folder_without_config_is_no_model_directory(tmp_path):
    with pytest.raises(ValueError, match="no model directory"):
        read_config(tmp_path)
