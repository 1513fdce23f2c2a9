"""JSON and text of any origin: hostile and damaged files are one sentence with file and line."""

import io
import json

import pytest

from dalle.io import text
from dalle.io.files import read_json, write_json
from dalle.io.text import check_text, is_caption, json_items, parse_json, read_text

HOSTILE = {
    "empty": b"",
    "cut": b'{"a": [1',
    "list": b"[]",
    "NUL": b'{"a\0": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "deeper than code recurses": b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}",
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_one_sentence_that_names_the_file(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json (is not JSON|is damaged)") as error:
        read_json(file)
    assert len(str(error.value)) < 400
    broken = '{"b": [{"c": 1},\n' + content.decode("utf-8", "surrogateescape") + "x]}"
    with pytest.raises(ValueError, match=r"x, line 2\b"):
        list(json_items(io.StringIO(broken), "b", "x"))


def test_json_that_is_whole_is_read_as_it_is(tmp_path):
    data = {"a": [{"b": "é\u2028"}, 2, "x", None], "c": {"a": [5]}, "empty": [], "none": {}, "number": 12345}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(data).encode())
    assert read_json(tmp_path / "x.json") == data == parse_json(json.dumps(data), "x")
    write_json(tmp_path / "y.json", {"name": "\udcff"})  # a file name of other bytes
    assert read_json(tmp_path / "y.json") == {"name": "\udcff"}
    for path in (tmp_path, tmp_path / "none", tmp_path / "x.json" / "y"):
        with pytest.raises(ValueError, match=str(path)):
            read_json(path)


@pytest.mark.parametrize("chunk", [1, 3, 2**20])
@pytest.mark.parametrize("indent", [None, 1])
def test_items_of_a_long_list_are_those_of_the_whole_file(monkeypatch, chunk, indent):
    monkeypatch.setattr(text, "PART", chunk)
    data = {"info": {"items": [0]}, "skipped": [1, [2]], "items": [{"a": "]},"}, 123, [], "x"], "last": 12}
    written = json.dumps(data, indent=indent)
    assert list(json_items(io.StringIO(written), "items", "x")) == data["items"]
    for other in ("last", "none", "info"):
        assert list(json_items(io.StringIO(written), other, "x")) == []
    for wrong in (written[:-1], f"{written} 1", '{"items": [1 2]}', '{"items": [], "items": []}', "{1: 2}"):
        with pytest.raises(ValueError, match="x, line"):
            list(json_items(io.StringIO(wrong), "items", "x"))


def test_lines_end_only_where_they_should(tmp_path):
    (tmp_path / "x").write_bytes("\ufeffa\u2028b\r\nc\x85d\re\x0bf\n".encode())
    assert read_text(tmp_path / "x", "").split("\n") == ["a\u2028b", "c\x85d", "e\x0bf", ""]
    (tmp_path / "x").write_bytes(b"\xff")
    for path in (tmp_path / "x", tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"expected a list"):
            read_text(path, "a list")


def test_captions_and_text():
    assert is_caption("a nan bread")
    assert not any(map(is_caption, ("", " ", "NaN", " none ", "\u200b", "\ufeff")))
    check_text("é\U0001f600")
    with pytest.raises(ValueError, match="UTF-8"):
        check_text("a \udcff")
