"""Filters of captioned images (paper section 2.3): captions, image sizes, a list of names.

On by default are the two that the paper states exactly: boilerplate captions and elongated images. Duplicates
need the whole dataset: scripts/check_data.py writes their names for `exclude_list`.
"""

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from dalle.data.config import FilterConfig

_OFF = FilterConfig(boilerplate=False, max_aspect_ratio=None)


class Filters:
    """The filters of a configuration in the order of its fields.

    Raises:
        ValueError: an exclude list that cannot be read, or an unknown language.
        ImportError: a language is given, and py3langid is not installed.
    """

    def __init__(self, config: FilterConfig):
        self.config = config
        self._caption_tests: dict[str, Callable[[str], bool]] = {}
        if config.boilerplate:
            self._caption_tests["boilerplate"] = is_boilerplate
        if config.min_words:
            self._caption_tests["min_words"] = lambda caption: count_words(caption) < config.min_words
        if config.language:
            detect = language_detector(config.language)
            self._caption_tests["language"] = lambda caption: detect(caption) not in (None, config.language)
        self._names: frozenset[str] = frozenset()
        if config.exclude_list:
            try:
                self._names = read_names(config.exclude_list)
            except OSError as error:
                problem = f"cannot read the exclude list {config.exclude_list} ({error})"
                raise ValueError(f"{problem}; give a text file with one name per line") from None

    def __reduce__(self):
        return Filters, (self.config,)

    def reason(self, captions: Sequence[str], width: int, height: int, name: str | None = None) -> str | None:
        """The first filter that drops a sample by the name of its field, or None.

        A caption filter drops a sample if it drops all of its captions.
        """
        config, shorter = self.config, min(width, height)
        if name is not None and name in self._names:
            return "exclude_list"
        if config.max_aspect_ratio and max(width, height) > config.max_aspect_ratio * shorter:
            return "max_aspect_ratio"
        if shorter < config.min_size:
            return "min_size"
        for filter_name, drops in self._caption_tests.items():
            left = [caption for caption in captions if not drops(caption)]
            if captions and not left:
                return filter_name
            captions = left
        return None

    def captions(self, captions: Sequence[str]) -> list[str]:
        """The captions that no filter drops."""
        tests = self._caption_tests.values()
        return [caption for caption in captions if not any(drops(caption) for drops in tests)]


def read_names(path: Path) -> frozenset[str]:
    """The names in a list, one a line, or separated by NUL as of find -print0; not all need be UTF-8."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path} is UTF-16, expected UTF-8; save it again")
    lines = data.split(b"\0" if b"\0" in data else b"\n")
    lines += [line.removesuffix(b"\r") for line in lines]
    return frozenset(line.decode("utf-8", "surrogateescape") for line in lines)


def write_names(path: Path, names: Sequence[str]) -> None:
    """Writes a list for `read_names`; NUL separates the names if a line feed is in one of them."""
    mark = b"\0" if any("\n" in name for name in names) else b"\n"
    path.write_bytes(b"".join(name.encode("utf-8", "surrogateescape") + mark for name in names))


def one_by_one(config: FilterConfig) -> dict[str, FilterConfig]:
    """Each active filter alone, by name, for a dry run."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: replace(_OFF, **{name: value}) for name, value in values.items() if value}


# scripts without spaces between words: each character counts as one
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['\u2019][^\W_]+)*")


def count_words(caption: str) -> int:
    """Runs of letters and digits, and single characters of Chinese and Japanese."""
    return len(_WORD.findall(caption))


_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?"
_DAY, _YEAR = r"(?:3[01]|[12]\d|0?[1-9])(?:st|nd|rd|th)?", r"(?:1[89]|20)\d\d"
_SHORT_YEAR = rf"(?:{_YEAR}|['\u2019]?\d\d)"
_DATES = "|".join(
    [
        rf"{_YEAR}[-/.:]\d\d?[-/.:]\d\d?",  # 2009-05-12
        rf"\d\d?[-/.]\d\d?[-/.]{_SHORT_YEAR}",  # 12.05.2009, 5/12/09
        rf"{_DAY}(?:\s+of)?[\s-]+{_MONTH},?[\s-]*{_SHORT_YEAR}",  # 12th of May, 2009; 12-May-09
        rf"{_MONTH}\s*{_DAY},?\s+{_SHORT_YEAR}",  # May 12, 2009
        rf"{_DAY}(?:\s+of)?\s+{_MONTH}",  # 12 May
        rf"{_MONTH}\s+{_DAY}",  # May 12
        rf"{_MONTH},?\s+{_YEAR}",  # May 2009
        rf"{_YEAR}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[_-]?\d{{6}})?",  # 20090512_143205
    ]
)
_DATE = re.compile(rf"(?<!\w)(?:{_DATES})(?!\w)")
_CAMERA_FILE = re.compile(
    r"(?<!\w)(?:img|dsc[nf]?|pict|sam|mvi|gopr|p)[\s_-]?\d{3,}(?:[\s_-]\d+)?(?:\.\w{3,4})?(?!\w)"
)
_AROUND_DATES = re.compile(
    rf"(?<!\w)(?:\d\d?[:.]\d\d(?:[:.]\d\d)?\s*(?:[ap]\.?m\.?)?|{_WEEKDAY}|{_YEAR}"
    r"|photo(?:s|graph(?:s|ed)?)?|images?|pics?|pictures?|snapshots?|shots?|scan(?:ned)?|taken"
    r"|shot|captured|recorded|uploaded|posted|published|created|added|dated?|time|stamp|file|camera|digital"
    r"|on|at|in|of|the|this|was|is|it"
    r"|a|an|by|from|and|&)(?!\w)"
)


def is_boilerplate(caption: str) -> bool:
    """Whether a caption is only a date or a camera's file name, and words such as "photographed on"."""
    text = caption.lower()
    rest = _DATE.sub(" ", _CAMERA_FILE.sub(" ", text))
    return rest != text and not re.search(r"\w", _AROUND_DATES.sub(" ", rest))


@cache
def language_detector(language: str) -> Callable[[str], str | None]:
    """Caption -> code of its language, or None at a probability of half or less.

    py3langid is the maintained langid.py (Lui and Baldwin 2012), with its model inside.
    """
    try:
        from py3langid import langid
    except ImportError:
        raise ImportError("filtering by language needs py3langid: pip install 'py3langid>=0.4'") from None
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if language not in identifier.labels:
        known = ", ".join(sorted(identifier.labels))
        raise ValueError(f"unknown language {language!r}; expected one of {known}")

    def detect(caption: str) -> str | None:
        found, probability = identifier.classify(caption)
        return found if probability > 0.5 else None

    return detect
