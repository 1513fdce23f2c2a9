"""Readers of data: images, sources, published captions, prompts, token caches."""

import gzip
import json
import os
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np

from dalle.commands.convert_captions import ConvertCaptionsArgs, convert_captions
from dalle.data import TokenCache
from dalle.data.bad_samples import BadSampleError
from dalle.data.dataset import ImageTextDataset
from dalle.data.sources import open_source
from dalle.data.token_cache import TokenCacheSpec, TokenWriter
from dalle.io.images import FORMATS
from dalle.pipelines.sample_prompts import read_prompts
from tests.helpers import formats
from tests.helpers.scenes import encoded, scene
from tests.torture.harness import LEFT_OUT, READ, Suite
from tests.torture.mutations import damage, damage_bytes

MODES = [("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("JPEG", "CMYK"), ("TIFF", "RGBA")]
MODES += [("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "P"), ("TIFF", "1"), ("TGA", "RGBA")]
MODES += [(form, "RGB") for form in FORMATS]


def make_images(whole: Path, chain: Path) -> None:
    """Folders of two images, the second always sound."""
    for form, mode in MODES:
        image = scene(0, (64, 48)).convert("I" if mode == "I;16" else mode)
        options = {"exif": b"Exif\0\0", "icc_profile": b"none"} if form == "JPEG" else {}
        with suppress(KeyError):  # this Pillow has no such format
            data = encoded(image, form, **options)
            files = {"a.png": data, "a.txt": "one", "b.png": encoded(scene(1)), "b.txt": "two"}
            formats.write_files(whole / f"{form}-{mode}", files)


def damage_image(folder: Path, rng: Random) -> str:
    file = folder / "a.png"
    data, how = damage_bytes(file.read_bytes(), file.name, rng)
    file.write_bytes(data)
    return how


def read_images(damaged: Path, whole: Path) -> str:
    batch = ImageTextDataset(open_source(damaged), 32).load([(0, 0), (0, 1)])
    sound = ImageTextDataset(open_source(whole), 32).load([(0, 1)])
    assert np.array_equal(batch.pixels[-1], sound.pixels[0]), "the sound image changed"
    assert np.isfinite(batch.pixels).all()
    assert len(batch.samples) + len(batch.skipped) == 2
    assert all(bad.name == "a.png" and bad.cause for bad in batch.skipped)
    return LEFT_OUT if batch.skipped else READ


SOURCES = ("folder", "folder_json", "csv_file", "tsv_file", "jsonl_file", "parquet_bytes", "parquet_paths")
SOURCES += ("one_tar", "tars", "tars_json", "hub")


def make_sources(whole: Path, chain: Path) -> None:
    """The same twelve captioned images in every format."""
    for name in SOURCES:
        (whole / name).mkdir()
        getattr(formats, name)(whole / name)


def read_source(damaged: Path, whole: Path) -> str:
    """Every sample is read or named; no row, file or member vanishes without a word."""
    source = open_source(damaged / "set" if damaged.name == "hub" else damaged)
    left_out, read = list(source.skipped), 0
    assert len(source.shares()) == len(source)
    for index in range(len(source)):
        try:
            assert isinstance(source.read(index).captions, list)
            assert source.captions(index) == source.read(index).captions
            read += 1
        except BadSampleError as error:
            left_out.append(error.skip(index))
    here = count_samples(damaged, whole)
    found = len(source) + sum(bad.index is None for bad in left_out)
    assert found >= here, f"{here} there, {found} found or left out: {left_out}"
    again = open_source(damaged / "set" if damaged.name == "hub" else damaged)  # by the index
    assert (len(again), again.hash, list(again.skipped)) == (len(source), source.hash, list(source.skipped))
    return LEFT_OUT if left_out else READ


def count_samples(damaged: Path, whole: Path) -> int:
    """Samples that are there, counted in another way; 0 where damage may hide them from any reader."""
    if "folder" in damaged.name:
        return sum(path.is_file() for path in damaged.glob("*.png"))
    (table,) = [path for path in damaged.glob("pairs.*") if path.is_file()] or [damaged]
    if table.suffix == ".jsonl":
        return sum(bool(line.strip()) for line in table.read_text(errors="surrogateescape").split("\n"))
    if table.suffix == ".tsv":
        return len(table.read_bytes().strip(b"\n").split(b"\n")) - 1
    return 0


def damage_index(folder: Path, rng: Random) -> str:
    """Builds the index, then damages it alone."""
    open_source(folder)
    (index,) = folder.rglob("*.index")
    data, how = damage_bytes(index.read_bytes(), index.name, rng)
    index.write_bytes(data)
    return how


def make_indexed(whole: Path, chain: Path) -> None:
    for name in ("csv_file", "jsonl_file", "one_tar"):
        (whole / name).mkdir()
        getattr(formats, name)(whole / name)


def read_indexed(damaged: Path, whole: Path) -> str:
    """A damaged index is made again."""
    ours, theirs = open_source(damaged), open_source(whole)
    samples = [[source.read(index) for index in range(formats.COUNT)] for source in (ours, theirs)]
    assert samples[0] == samples[1]
    return READ


def make_captions(whole: Path, chain: Path) -> None:
    """What the datasets' authors publish, of twelve images, and files of prompts."""
    n = range(formats.COUNT)
    names = [f"p{i:03}.png" for i in n]
    texts = [f"a cat, {i}, größe" for i in n]
    coco = {"images": [{"id": i, "file_name": names[i]} for i in n], "info": {"year": 2017}}
    coco |= {"annotations": [{"image_id": i, "id": i, "caption": texts[i]} for i in n]}
    karpathy = [{"filename": names[i], "sentences": [{"raw": texts[i], "tokens": ["a"]}]} for i in n]
    redcaps = [{"image_id": f"p{i:03}", "caption": texts[i], "subreddit": None} for i in n]
    narratives = [json.dumps({"image_id": f"p{i:03}", "caption": texts[i]}) for i in n]
    svg = '<svg xmlns:d="http://purl.org/dc/elements/1.1/"><Work><d:title>a cat</d:title></Work></svg>'
    published = {
        "coco": ("captions.json", json.dumps(coco)),
        "karpathy": ("dataset.json", json.dumps({"images": karpathy})),
        "redcaps": ("cats_2020.json", json.dumps({"annotations": redcaps})),
        "narratives": ("narratives.jsonl", "\n".join(narratives)),
        "cc": ("train.tsv", "\n".join(f"{texts[i]}\thttp://a/{i}" for i in n)),
        "cc12m": ("cc12m.tsv", "\n".join(f"http://a/{i}\t{texts[i]}" for i in n)),
        "flickr": ("results.token", "\n".join(f"{names[i]}#0\t{texts[i]}" for i in n)),
        "openclipart": ("p000.svg", svg),
    }
    for form, (name, text) in published.items():
        images = formats.images("images/")
        if form.startswith("cc"):
            images |= {f"images/{i}.png": formats.image(i) for i in n}
        formats.write_files(whole / form, images | {f"captions/{name}": text})
    packed = gzip.compress(json.dumps(coco).encode())
    formats.write_files(whole / "coco-gz", formats.images("images/") | {"captions/captions.json.gz": packed})
    lines = [json.dumps({"prompt": text}) for text in texts]
    formats.write_files(whole, {"prompts.txt": "\n".join(texts), "prompts.jsonl": "\n".join(lines)})


def damage_captions(path: Path, rng: Random) -> str:
    return damage(path if path.is_file() else path / "captions", rng)


def read_published(damaged: Path, whole: Path) -> str:
    if damaged.is_file():
        assert all(isinstance(prompt, str) and prompt for prompt in read_prompts(damaged))
        return READ
    form, out = damaged.name.removesuffix("-gz"), damaged / "table.jsonl"
    result = convert_captions(ConvertCaptionsArgs(form, damaged / "captions", damaged / "images", out))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert (len(rows), sum(len(row["captions"]) for row in rows)) == (result.images, result.captions)
    assert all(os.path.isfile(damaged / row["image"]) for row in rows)
    return LEFT_OUT if result.left_out else READ


def make_cache(whole: Path, chain: Path) -> None:
    spec = TokenCacheSpec(dvae="abc", data="def", grid=(2, 3), vocab=65536, images=11, crops=2, shard=4)
    writer, tokens = TokenWriter(whole / "tokens", spec), np.arange(132).reshape(11, 2, 6)
    for shard in writer.missing():
        numbers = spec.numbers(shard)
        writer.write(shard, tokens[numbers], [[f"image {n}", "سماء"] for n in numbers])
    writer.finish()


def read_cache(damaged: Path, whole: Path) -> str:
    """Tokens and captions of an accepted image are the true ones."""
    ours, theirs = TokenCache(damaged), TokenCache(whole)
    images = range(theirs.size)
    assert ours.size == theirs.size
    assert ours.image_tokens(images).equal(theirs.image_tokens(images))
    assert ours.captions(images) == theirs.captions(images)
    return READ


SUITES = {
    "images": Suite(make_images, read_images, damage_image),
    "sources": Suite(make_sources, read_source),
    "indexes": Suite(make_indexed, read_indexed, damage_index),
    "captions": Suite(make_captions, read_published, damage_captions),
    "token caches": Suite(make_cache, read_cache),
}
