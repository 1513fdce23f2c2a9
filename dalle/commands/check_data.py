"""A report on your data before training: sizes, captions, bad samples, duplicates, what filters drop.

python scripts/check_data.py --data.path my/images
python scripts/check_data.py --data.path "my/tars/{000..099}.tar" --text-tokenizer runs/text --max-bad 0
python scripts/check_data.py --data.path my/images --exclude-list duplicates.txt
python scripts/train_dvae.py --data.path my/images --data.filters.exclude-list duplicates.txt

Writes report.json, bad_samples.jsonl (every bad sample with its cause) and contact_sheet.png to --out.
--data.filters (default: all of the paper's) are tried one by one; nothing is dropped. The exit status is 1
when too many samples are bad, else 0.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle.config import cli_errors, configuration, parse
from dalle.data.config import PAPER_FILTERS, UNUSED, DataConfig
from dalle.layout import TokenLayout
from dalle.runs import ROOT

if TYPE_CHECKING:
    from dalle.data.bad_samples import BadSampleLog
    from dalle.data.statistics import DatasetStats
    from dalle.types import DataSource

MAX_NAMED = 100
"""Bad samples and duplicates named in report.json; bad_samples.jsonl and the exclude list name all."""
COLUMNS = 8
"""Columns of the contact sheet."""
MAX_CAPTION = 100
"""Characters of a caption on the contact sheet."""


@configuration
class CheckDataArgs:
    """Reads every sample once and reports on sizes, captions, bad samples, duplicates and filters."""

    data: DataConfig = DataConfig(filters=PAPER_FILTERS)
    """The dataset, validation split included, and the filters to try; default: all of section 2.3."""
    out: Path | None = None
    """Directory of the report; default: runs/check."""
    text_tokenizer: Path | None = None
    """Text tokenizer (run, tokenizer.json, youtokentome model) to count tokens with; default: none."""
    text_len: int = TokenLayout().text_len
    """Text positions of the transformer, to report the fraction of captions that would be cut."""
    sheet: int = 48
    """Images on contact_sheet.png, spread over the dataset; 0 for none."""
    exclude_list: Path | None = None
    """File to write for --data.filters.exclude-list: names of all duplicates but the first of each image."""
    max_bad: float | None = None
    """Fraction of bad samples above which the exit status is 1; 0 allows none. Default: as in training, more
    than --data.max-bad-fraction and more than a hundred samples."""

    def __post_init__(self):
        if self.sheet < 0:
            raise ValueError(f"sheet must be 0 (none) or more images, got {self.sheet}")
        TokenLayout(text_len=self.text_len)  # checks it
        if self.max_bad is not None and not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad is a fraction, so in [0, 1], got {self.max_bad}")


def check_data(args: CheckDataArgs) -> dict[str, Any]:
    """Writes and prints the report, and returns it.

    Raises:
        ValueError: no data, or more bad samples than allowed; then everything is written nevertheless.
    """
    from tqdm import tqdm

    from dalle.data.bad_samples import BadSampleLog
    from dalle.data.dataloader import worker_count
    from dalle.data.dataset import note_left_out, source_of
    from dalle.data.filters import write_names
    from dalle.data.statistics import DatasetScanner, DatasetStats, find_duplicates
    from dalle.io.files import check_result, make_directory, prepare_file, write_json
    from dalle.io.images import captioned_grid
    from dalle.runs.inputs import load_text_input

    if args.data.path is None:
        raise ValueError("no data: give --data.path, a folder, a table or tars (docs/data.md)")
    if args.data.path == "shapes":
        raise ValueError("the shapes are generated, nothing to check; give --data.path with your own images")
    if args.data.val_path:
        print(f"note: {args.data.val_path} is not read; check it in a run of its own")
    out = make_directory(check_result(args.out or ROOT / "check"))
    if args.exclude_list:
        prepare_file(args.exclude_list)
    source = source_of(args.data, args.data.path)
    note_left_out(args.data.path, source)
    workers = worker_count(args.data.workers, len(source))
    text = load_text_input(args.text_tokenizer) if args.text_tokenizer else None
    tiles = {i * len(source) // args.sheet for i in range(args.sheet)}
    try:
        scanner = DatasetScanner(source, args.data.filters, text, tiles)
    except ImportError as error:
        print(f"note: {error}; until then that filter is not tried")
        scanner = DatasetScanner(source, replace(args.data.filters, language=None), text, tiles)
    stats = DatasetStats(skipped=list(source.skipped[:MAX_NAMED]))
    bad_samples = BadSampleLog(out / "bad_samples.jsonl", len(source), source.skipped, limit=1)
    with tqdm(total=len(source), desc="check", unit="image", disable=None) as bar:
        for step, part in enumerate(scanner.scan(workers)):
            stats.add(part)
            bad_samples.add(part.skipped, step, len(source))
            stats.skipped += part.skipped[: MAX_NAMED - len(stats.skipped)]
            bar.update(len(part.indices) + len(part.skipped))
    duplicates = list(find_duplicates(source, stats, workers))
    report = _report(args, source, stats, bad_samples, duplicates, list(scanner.filters))
    write_json(out / "report.json", report)
    (out / "contact_sheet.png").unlink(missing_ok=True)
    if stats.tiles:
        cells = [(_printable(caption)[:MAX_CAPTION], image) for caption, image in stats.tiles]
        captioned_grid(cells, min(COLUMNS, len(cells))).save(out / "contact_sheet.png")
    if args.exclude_list:
        write_names(args.exclude_list, [source.name(copy) for copy, _ in duplicates])
    _print_report(report, args, out)
    _check_limit(report["bad"], args, str(bad_samples))
    return report


def _check_limit(bad: dict[str, Any], args: CheckDataArgs, named: str) -> None:
    """ValueError if more samples are bad than --max-bad allows, or without it a training."""
    from dalle.data.bad_samples import check_bad_fraction

    if args.max_bad is None:
        check_bad_fraction(bad["samples"], bad["of"], args.data.max_bad_fraction, named)
    elif bad["samples"] > args.max_bad * bad["of"]:
        problem = f"{bad['samples']} of {bad['of']} samples are bad, more than --max-bad {args.max_bad:g}"
        raise ValueError(f"{problem}: {named}")


def _report(
    args: CheckDataArgs,
    source: "DataSource",
    stats: "DatasetStats",
    bad_samples: "BadSampleLog",
    duplicates: list[tuple[int, int]],
    filters: list[str],
) -> dict[str, Any]:
    from dalle.data.statistics import summarize

    unused = bad_samples.counts[UNUSED]
    usable, seen = len(stats.indices), len(source) + len(source.skipped) - unused
    sides, words = stats.counts["shorter_side"], stats.counts["words"]
    tokens, dropped = stats.counts["tokens"], stats.counts["dropped"]
    small = sum(count for side, count in sides.items() if side < args.data.resolution)
    report = {
        "path": args.data.path,
        "hash": source.hash,
        "samples": seen,
        "usable": usable,
        "captions": words.total(),
        "bad": _fraction(bad_samples.counts.total() - unused, seen)
        | {"causes": dict(bad_samples.counts.most_common()), "named": [asdict(bad) for bad in stats.skipped]},
        "shorter_side": summarize(sides),
        "smaller_than_resolution": _fraction(small, usable),
        "aspect": summarize(stats.counts["aspect"]),
        "words": summarize(words),
        "duplicates": _fraction(len(duplicates), usable)
        | {"named": [{"copy": source.name(i), "of": source.name(j)} for i, j in duplicates[:MAX_NAMED]]},
        "filters": {
            name: _fraction(dropped[name], usable) | {"examples": stats.examples[name]} for name in filters
        },
        "all_filters": _fraction(dropped["all"], usable),
    }
    if args.text_tokenizer:
        limit = TokenLayout(text_len=args.text_len).max_caption_len
        cut = sum(count for length, count in tokens.items() if length > limit)
        more = {"max_caption_len": limit, "cut": _fraction(cut, tokens.total())}
        report["tokens"] = summarize(tokens) | more
    return _printable(report)


def _fraction(count: int, of: int) -> dict[str, Any]:
    return {"samples": count, "of": of, "fraction": round(count / max(1, of), 6)}


def _printable(value: Any) -> Any:
    """The value with ? for lone surrogates: names of files and captions may hold any bytes."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def _print_report(report: dict[str, Any], args: CheckDataArgs, out: Path) -> None:
    def percent(numbers: dict[str, Any]) -> str:
        return f"{numbers['samples']:,} of {numbers['of']:,} ({numbers['fraction']:.2%})"

    def print_summary(title: str, numbers: dict[str, Any]) -> None:
        if numbers:
            text = "{}: median {median}, 90% from {p5} to {p95}, all from {min} to {max}"
            print(text.format(title, **numbers))

    bad, duplicates, small = report["bad"], report["duplicates"], report["smaller_than_resolution"]
    print(f"{args.data.path}: {report['usable']} usable images with {report['captions']} captions")
    print(f"bad samples: {percent(bad)}; left out in all, unused files included:")
    for cause, count in bad["causes"].items():
        name = next((named["name"] for named in bad["named"] if named["cause"] == cause), "not named")
        print(f"  {count:9,}  {cause}, for example {name:.200}")
    print_summary("shorter side, pixels", report["shorter_side"])
    print(f"  smaller than --data.resolution, so that no crop fits: {percent(small)}")
    print_summary("width / height", report["aspect"])
    print_summary("words per caption", report["words"])
    if "tokens" in report:
        tokens = report["tokens"]
        print_summary("tokens per caption", tokens)
        print(f"  longer than {tokens['max_caption_len']}, so cut: {percent(tokens['cut'])}")
    print(f"duplicates: {percent(duplicates)}; --exclude-list FILE writes their names")
    for pair in duplicates["named"][:3]:
        print(f"             {pair['copy']} is a copy of {pair['of']}")
    print(f"filters: {percent(report['all_filters'])} would be dropped by")
    for name, numbers in report["filters"].items():
        print(f"  {numbers['samples']:9,}  {name} ({numbers['fraction']:.2%})")
        for example in numbers["examples"][:3]:
            width, height = example["size"]
            captions = " / ".join(example["captions"])[:MAX_CAPTION]
            print(f"             {example['name']}, {width} x {height}: {captions}")
    files = ("report.json", "bad_samples.jsonl", "contact_sheet.png")
    print(f"{out}: {', '.join(name for name in files if (out / name).is_file())}")


def main() -> None:
    """Command line of check_data."""
    with cli_errors():
        check_data(parse(CheckDataArgs, description=__doc__))
