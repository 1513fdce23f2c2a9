"""Readers of public caption datasets, from the files that their authors publish, one record at a time.

    coco         captions_train2017.json: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}
    karpathy     dataset_coco.json, dataset_flickr30k.json: {"images": [{filename, sentences: [{raw}]}]}
    cc           Train_GCC-training.tsv: caption, URL
    cc12m        cc12m.tsv: URL, caption
    redcaps      <subreddit>_<year>.json: {"annotations": [{image_id, subreddit, caption}]}
    narratives   open_images_*_localized_narratives*.jsonl: {image_id, caption} per line
    flickr       results_20130124.token, Flickr8k.token.txt: image#number, caption
    openclipart  *.svg with title and keywords in their metadata

Any of them may be compressed by gzip. A record names its image in the dataset's own way;
`dalle.commands.convert_captions` finds that image in a folder.
"""

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

from dalle.io.text import is_caption, json_items, parse_json, read_lines

Format = Literal["coco", "karpathy", "cc", "cc12m", "redcaps", "narratives", "flickr", "openclipart"]
Naming = Literal["number", "md5", "sha256"]

SUFFIXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("coco", "karpathy", "redcaps"), (".json",)),
    **dict.fromkeys(("cc", "cc12m"), (".tsv",)),
    "narratives": (".jsonl",),
    "flickr": (".token", ".txt"),
    "openclipart": (".svg",),
}
DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
STOP_TITLES = {"clip art", "clipart", "image", "media", "svg", "png", "public domain"}


class CaptionRecord(NamedTuple):
    """A record. `name` is a file name, or with a slash a path within the dataset; its suffix may be missing.

    A bad record has the name None and the problem in `captions`.
    """

    name: str | None
    captions: list[str]


def published_files(path: Path, format: Format) -> list[Path]:
    """A file, or the files of a format below a folder, by name; ValueError if there are none."""
    if path.is_file():
        return [path]
    endings = SUFFIXES[format] + tuple(f"{suffix}.gz" for suffix in SUFFIXES[format])
    found = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings))
    if not found:
        wanted = f"folder {path} with {', '.join(endings)}" if path.is_dir() else f"file or folder {path}"
        raise ValueError(f"no {wanted}; expected captions as {format} publishes them")
    return found


def read_captions(
    file: Path, format: Format, naming: Naming = "number", root: Path | None = None
) -> Iterator[CaptionRecord]:
    """The records of a published file in order; ValueError for another format, or a truncated file.

    `naming` is that of the images of `cc` and `cc12m`, whose records have only a URL; names in `openclipart`
    are relative to `root`, or else to the folder of the file.
    """
    if format in ("cc", "cc12m"):
        return _conceptual(file, naming, caption_first=format == "cc")
    if format == "openclipart":
        return _openclipart(file, root or file.parent)
    readers = {"coco": _coco, "karpathy": _karpathy, "redcaps": _redcaps}
    readers |= {"narratives": _narratives, "flickr": _flickr}
    return readers[format](file)


def _coco(file: Path) -> Iterator[CaptionRecord]:
    """Two passes: names of images, then captions, in whichever order the file has them."""
    names = {str(item.get("id")): item.get("file_name") for item in _json_list(file, "images")}
    for item in _json_list(file, "annotations"):
        number = item.get("image_id")
        if isinstance(name := names.get(str(number)), str) and name:
            yield CaptionRecord(name, _clean(item.get("caption")))
        else:
            yield CaptionRecord(None, [f"{file.name}: a caption of the unlisted image_id {number!r:.80}"])


def _karpathy(file: Path) -> Iterator[CaptionRecord]:
    for item in _json_list(file, "images"):
        found = item.get("sentences")
        sentences = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
        yield _record(file.name, item, "filename", *(sentence.get("raw") for sentence in sentences))


def _redcaps(file: Path) -> Iterator[CaptionRecord]:
    """The authors' downloader saves an image as <subreddit>/<image_id>.jpg."""
    for item in _json_list(file, "annotations"):
        record = _record(file.name, item, "image_id", item.get("caption") or item.get("raw_caption"))
        folder = item.get("subreddit")
        named = record.name and isinstance(folder, str) and folder
        yield record._replace(name=f"{folder}/{record.name}") if named else record


def _narratives(file: Path) -> Iterator[CaptionRecord]:
    for place, line in _lines(file):
        try:
            item = parse_json(line, place)
            yield _record(place, item, "image_id", item.get("caption"))
        except (ValueError, AttributeError):
            yield CaptionRecord(None, [f"{place}: not a JSON object"])


def _conceptual(file: Path, naming: Naming, caption_first: bool) -> Iterator[CaptionRecord]:
    """Two columns separated by a tab, without quoting; a header is skipped."""
    number = -1
    for place, line in _lines(file):
        fields = line.split("\t")
        number += 1
        if number == 0 and sorted(field.lower() for field in fields) == ["caption", "url"]:
            number = -1  # of the header; the records count from 0
        elif len(fields) != 2:
            yield CaptionRecord(None, [f"{place}: {len(fields)} columns, expected 2"])
        else:
            caption, url = fields if caption_first else fields[::-1]
            name = str(number)
            if naming != "number":
                name = hashlib.new(naming, url.encode("utf-8", "surrogateescape")).hexdigest()
            yield CaptionRecord(name, _clean(caption))


def _flickr(file: Path) -> Iterator[CaptionRecord]:
    for place, line in _lines(file):
        name, tab, caption = line.partition("\t")
        if tab and "#" in name:
            yield CaptionRecord(name.rpartition("#")[0], _clean(caption))
        else:
            yield CaptionRecord(None, [f"{place}: expected image#number, a tab, a caption"])


def _openclipart(file: Path, root: Path) -> Iterator[CaptionRecord]:
    """One caption: the title, then the keywords that are not in it."""
    name = re.sub(r"(\.svg)?(\.gz)?$", "", file.relative_to(root).as_posix(), flags=re.IGNORECASE)
    try:
        with _open(file, "rb") as opened:
            tree = ElementTree.parse(opened)
    except (ElementTree.ParseError, OSError, EOFError, ValueError, LookupError, zlib.error) as error:
        yield CaptionRecord(None, [f"{file.name}: not XML: {error}"])
        return
    title = "".join(_clean(tree.findtext(f".//{{*}}Work/{DUBLIN_CORE}title")))
    items = tree.iterfind(f".//{{*}}Work/{DUBLIN_CORE}subject//{{*}}li")
    words = dict.fromkeys(_clean(*(item.text for item in items)))
    new = [word for word in words if word.lower() not in STOP_TITLES and word.lower() not in title.lower()]
    yield CaptionRecord(name, _clean(", ".join(filter(None, [title, *new]))))


def _open(file: Path, mode: str = "rt") -> Any:
    """A file, unpacked; bytes of its text that are not UTF-8 become lone surrogates, counted later."""
    unpack = gzip.open if file.suffix.lower() == ".gz" else open
    text = {"encoding": "utf-8-sig", "errors": "surrogateescape"} if mode == "rt" else {}
    return unpack(file, mode, **text)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """("FILE, line N", line)."""
    with _open(file) as lines:
        for number, line in enumerate(read_lines(lines), 1):
            yield f"{file.name}, line {number}", line.rstrip("\n")


def _json_list(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """The objects in the list `key` of a JSON file, one in memory at a time."""
    empty = True
    with _open(file) as opened:
        for item in json_items(opened, key, str(file)):
            empty = False
            if isinstance(item, dict):
                yield item
    if empty:
        raise ValueError(f"{file} has no list {key!r}; is it in this format?")


def _clean(*captions: Any) -> list[str]:
    """The captions that are text and not blank, on one line each."""
    return [" ".join(text.split()) for text in captions if isinstance(text, str) and is_caption(text)]


def _record(place: str, item: dict[str, Any], key: str, *captions: Any) -> CaptionRecord:
    name = item.get(key)
    if type(name) in (str, int) and name != "":
        return CaptionRecord(str(name), _clean(*captions))
    return CaptionRecord(None, [f"{place}: a record without {key}"])
