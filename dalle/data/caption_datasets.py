"""Captions of public sets, read from the files in which their authors publish them, one record at a time.

A record names its image in its set's own way; `dalle.commands.convert_captions` looks for that image in a folder.

    coco         captions_train2017.json: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}
    karpathy     dataset_coco.json, dataset_flickr30k.json: {"images": [{filename, sentences: [{raw}]}]}
    cc           Train_GCC-training.tsv: caption, URL
    cc12m        cc12m.tsv: URL, caption
    redcaps      <subreddit>_<year>.json: {"annotations": [{image_id, subreddit, caption}]}
    narratives   open_images_*_localized_narratives*.jsonl: {image_id, caption} a line
    flickr       results_20130124.token, Flickr8k.token.txt: image#number, caption
    openclipart  *.svg with title and keywords in their metadata
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from xml.etree import ElementTree

from dalle.data.long_json import json_items, open_text

Format = Literal["coco", "karpathy", "cc", "cc12m", "redcaps", "narratives", "flickr", "openclipart"]
Naming = Literal["number", "md5", "sha256"]

SUFFIXES: dict[str, tuple[str, ...]] = {
    "coco": (".json",),
    "karpathy": (".json",),
    "cc": (".tsv",),
    "cc12m": (".tsv",),
    "redcaps": (".json",),
    "narratives": (".jsonl",),
    "flickr": (".token", ".txt"),
    "openclipart": (".svg",),
}
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
BOILERPLATE = {"clip art", "clipart", "image", "media", "svg", "png", "public domain"}


class CaptionRecord(NamedTuple):
    """What a record says. `name` is a path within the set where it has a slash, else a file name; the suffix may lack.

    A record that cannot be read has no name, and says why in `captions`.
    """

    name: str | None
    captions: list[str]


def published_files(path: Path, format: Format) -> list[Path]:
    """A file, or those of the format's suffix below a folder, by name; `.gz` behind it is as good.

    Raises:
        ValueError: nothing there.
    """
    if path.is_file():
        return [path]
    suffixes = tuple(suffix + ending for suffix in SUFFIXES[format] for ending in ("", ".gz"))
    found = sorted(
        file for file in path.rglob("*") if file.name.lower().endswith(suffixes) and file.is_file()
    )
    if not found:
        what = (
            f"folder {path} with {', '.join(SUFFIXES[format])}" if path.is_dir() else f"file or folder {path}"
        )
        raise ValueError(f"no {what}; expected captions as {format} publishes them")
    return found


def read_published(
    file: Path, format: Format, naming: Naming = "number", root: Path | None = None
) -> Iterator[CaptionRecord]:
    """The records of one published file, in its order.

    Args:
        file: of the set's own format.
        format: which set's.
        naming: how the images of `cc` and `cc12m` are called, whose records know a URL only.
        root: the folder that names in `openclipart` begin at; the file's own unless given.

    Raises:
        ValueError: a file of another format, or one that breaks off.
    """
    match format:
        case "coco":
            return _coco(file)
        case "karpathy":
            return _karpathy(file)
        case "cc" | "cc12m":
            return _links(file, naming, caption_first=format == "cc")
        case "redcaps":
            return _redcaps(file)
        case "narratives":
            return _narratives(file)
        case "flickr":
            return _flickr(file)
        case "openclipart":
            return _openclipart(file, root or file.parent)
    raise ValueError(f"unknown format {format!r}; expected one of {', '.join(get_args(Format))}")


# ---------------------------------------------------------------------------------------------
# One reader a format
# ---------------------------------------------------------------------------------------------


def _coco(file: Path) -> Iterator[CaptionRecord]:
    """Twice through the file: names of images, then captions, whichever comes first in it."""
    names = {
        item["id"]: item["file_name"]
        for item in json_items(file, "images")
        if {"id", "file_name"} <= item.keys()
    }
    for item in json_items(file, "annotations"):
        name, caption = names.get(item.get("image_id")), item.get("caption")
        if name is None:
            yield CaptionRecord(
                None, [f"{file.name}: a caption of image_id {item.get('image_id')!r}, which is not listed"]
            )
        else:
            yield CaptionRecord(name, _texts(caption))


def _karpathy(file: Path) -> Iterator[CaptionRecord]:
    for item in json_items(file, "images"):
        sentences = item.get("sentences")
        raw = [sentence.get("raw") for sentence in sentences or [] if isinstance(sentence, dict)]
        yield _named(file, item, "filename", _texts(*raw))


def _redcaps(file: Path) -> Iterator[CaptionRecord]:
    """The authors' downloader puts an image at <subreddit>/<image_id>.jpg."""
    for item in json_items(file, "annotations"):
        record = _named(file, item, "image_id", _texts(item.get("caption") or item.get("raw_caption")))
        folder = item.get("subreddit")
        yield record._replace(name=f"{folder}/{record.name}") if record.name and folder else record


def _narratives(file: Path) -> Iterator[CaptionRecord]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                item = json.loads(line)
            except ValueError:
                item = None
            if not isinstance(item, dict):
                yield CaptionRecord(None, [f"{file.name}, line {number}: not a JSON object"])
            else:
                yield _named(file, item, "image_id", _texts(item.get("caption")))


def _links(file: Path, naming: Naming, caption_first: bool) -> Iterator[CaptionRecord]:
    """Two columns of tabs, quotes mean nothing; a header that somebody put on top is no record."""
    number = 0
    with open_text(file) as lines:
        for line in lines:
            fields = line.rstrip("\r\n").split("\t")
            if number == 0 and sorted(field.lower() for field in fields) == ["caption", "url"]:
                continue
            if len(fields) == 2:
                caption, url = fields if caption_first else fields[::-1]
                yield CaptionRecord(_link_name(url, number, naming), _texts(caption))
            else:
                yield CaptionRecord(
                    None, [f"{file.name}, record {number}: {len(fields)} columns, expected 2"]
                )
            number += 1


def _link_name(url: str, number: int, naming: Naming) -> str:
    if naming == "number":
        return str(number)
    return hashlib.new(naming, url.encode("utf-8", "surrogateescape")).hexdigest()


def _flickr(file: Path) -> Iterator[CaptionRecord]:
    with open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            name, tab, caption = line.rstrip("\r\n").partition("\t")
            if tab and "#" in name:
                yield CaptionRecord(name.rpartition("#")[0], _texts(caption))
            else:
                yield CaptionRecord(
                    None, [f"{file.name}, line {number}: expected image#number, a tab, a caption"]
                )


def _openclipart(file: Path, root: Path) -> Iterator[CaptionRecord]:
    """One caption: the title, then the keywords that it does not say already."""
    name = file.relative_to(root).with_suffix("").as_posix()
    try:
        tree = ElementTree.parse(file)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        yield CaptionRecord(None, [f"{file.name}: not XML: {error}"])
        return
    work = next((node for node in tree.iter() if str(node.tag).endswith("}Work")), None)
    if work is None:
        yield CaptionRecord(name, [])
        return
    title = " ".join((work.findtext(f"{DUBLIN_CORE}title") or "").split())
    subject = work.find(f"{DUBLIN_CORE}subject")
    items = [] if subject is None else [node for node in subject.iter() if str(node.tag).endswith("}li")]
    words = [" ".join((node.text or "").split()) for node in items]
    fresh = [word for word in words if word.lower() not in BOILERPLATE and word.lower() not in title.lower()]
    yield CaptionRecord(name, _texts(", ".join(filter(None, [title, *dict.fromkeys(fresh)]))))


def _texts(*captions: Any) -> list[str]:
    """What is text and not blank, in one line each."""
    lines = [" ".join(caption.split()) for caption in captions if isinstance(caption, str)]
    return [line for line in lines if line]


def _named(file: Path, item: dict[str, Any], key: str, captions: list[str]) -> CaptionRecord:
    name = item.get(key)
    if isinstance(name, str | int) and str(name):
        return CaptionRecord(str(name), captions)
    return CaptionRecord(None, [f"{file.name}: a record without {key}"])
