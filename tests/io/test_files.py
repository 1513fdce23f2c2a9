"""meta.json and config.json: other formats and damaged files are named."""

import pytest
import torch

from dalle.io.files import FORMAT, check_meta, read_config, write_json, write_tensors

META = {"kind": "dvae", "format": FORMAT, "model_config": {}, "inputs": {}}
PART = {"model_config": {"width": 2}, "hash": "00ff"}
CONFIG = {"kind": "dalle", "format": FORMAT, "inputs": {}, "parts": {"dvae": PART}}


BAD_PARTS = [None, [], {}, {"../dvae": PART}]
BAD_PARTS += [{"dvae": part} for part in (3, {"hash": "00ff"}, PART | {"hash": None})]


@pytest.mark.parametrize(
    ("meta", "message"),
    [(meta, "unknown") for meta in (None, [], "dvae", 3, META | {"kind": None})]
    + [(META | {"format": number}, f"format {number}") for number in (0, None, True)]
    + [
        (META | {"format": FORMAT + 1}, rf"format {FORMAT + 1}, .* reads {FORMAT}; use the version"),
        (META | {"kind": "clip"}, "'clip', expected 'dvae'"),
        (META | {"inputs": ["text"]}, "inputs .* damaged"),
    ],
)
def test_bad_meta_is_refused(tmp_path, meta, message):
    assert check_meta(META, "dvae", tmp_path) == META
    with pytest.raises(ValueError, match=message):
        check_meta(meta, "dvae", tmp_path)


@pytest.mark.parametrize("parts", BAD_PARTS, ids=str)
def test_a_damaged_config_is_refused(tmp_path, parts):
    write_json(tmp_path / "config.json", CONFIG)
    assert read_config(tmp_path) == CONFIG
    for damaged in (CONFIG | {"parts": parts}, {name: CONFIG[name] for name in CONFIG if name != "inputs"}):
        write_json(tmp_path / "config.json", damaged)
        with pytest.raises(ValueError, match="damaged"):
            read_config(tmp_path)


def test_weights_have_the_permissions_of_any_new_file(tmp_path):
    write_tensors(tmp_path / "weights", {"a": torch.zeros(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "other").stat().st_mode
