"""Columns of Parquet and Hugging Face datasets: dalle/data/sources/{table,hf_datasets}.py."""

import pytest

from dalle.data import open_source
from dalle.data.bad_samples import BadSampleError
from tests.helpers.formats import all_captions, caption, image, skipped, write_files, write_parquet


def test_text_that_is_not_utf8_costs_its_row_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"one", b"caf\xe9", b"three"]).buffers())
    source = open_source(write_parquet(tmp_path / "a.parquet", {"path": ["a.png"] * 3, "caption": texts}))
    assert all_captions(source) == [["one"], ["three"]]
    assert skipped(source) == [("a.parquet/1", "caption not UTF-8")]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "list"])
def test_captions_as_bytes_in_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    write_files(tmp_path, {"a.png": image(1)})
    kinds = {"binary": pa.binary(), "large_binary": pa.large_binary(), "list": pa.list_(pa.binary())}
    texts = [caption(3)[1].encode(), "猫 قط".encode(), b"caf\xe9", None]
    values = [[text] for text in texts] if kind == "list" else texts
    write_parquet(tmp_path / "a.parquet", {"path": ["a.png"] * 4, "caption": pa.array(values, kinds[kind])})
    source = open_source(tmp_path)
    assert [source.captions(i) for i in (0, 1, 3)] == [["größe 3"], ["猫 قط"], []]
    with pytest.raises(BadSampleError, match=r"a\.png: caption not UTF-8"):
        source.read(2)


def test_captions_as_bytes_in_a_hub_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": image(i), "path": None} for i in range(2)]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("binary")})
    rows = {"image": images, "text": ["größe".encode(), b"caf\xe9"]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(str(tmp_path / "set"))
    source = open_source(tmp_path / "set")
    assert source.read(0).captions == source.captions(0) == ["größe"]
    with pytest.raises(BadSampleError, match="row 1: caption not UTF-8"):
        source.read(1)


def test_a_replaced_file_of_parquet_is_not_read(tmp_path):
    pytest.importorskip("pyarrow")
    rows = {"image": [image(1), image(2)], "caption": ["one", "two"]}
    source = open_source(write_parquet(tmp_path / "a.parquet", rows))
    assert source.read(0).image == image(1)
    write_parquet(tmp_path / "a.parquet", {name: [*values[::-1], values[0]] for name, values in rows.items()})
    with pytest.raises(BadSampleError, match="it has changed"):
        source.read(0)


def test_paths_may_be_categorical(tmp_path):
    pa = pytest.importorskip("pyarrow")
    write_files(tmp_path, {"a.png": image(1)})
    paths = pa.array(["a.png"] * 2).dictionary_encode()
    source = open_source(write_parquet(tmp_path / "a.parquet", {"path": paths, "caption": ["one", "two"]}))
    assert all_captions(source) == [["one"], ["two"]]
    assert source.read(1).image == image(1)
