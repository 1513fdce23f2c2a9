"""Read all of your data once, before you train: what is in it, what is broken, what is there twice.

python scripts/check_data.py --data.path my/images
python scripts/check_data.py --data.path "my/tars/{000..099}.tar" --text-tokenizer runs/text --max-broken 0
python scripts/check_data.py --data.path my/images --exclude-list twice.txt
python scripts/train_dvae.py --data.path my/images --data.filters.exclude-list twice.txt

Writes report.json, skipped.jsonl (every sample that cannot be used, and why), sheet.png (images with their
captions) and duplicates.png to --out. --data.filters are tried out one by one, all of the paper's unless you set
them, and nothing is dropped. Exit status: 0, or 1 when too much is broken, for a script that is to stop there.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dalle.config import cli_errors, parse
from dalle.data import DataConfig, open_source
from dalle.data.bad_samples import BadSampleLog, check_bad_fraction
from dalle.data.config import PAPER_FILTERS, FilterConfig
from dalle.data.dataloader import worker_count
from dalle.data.filters import language_detector
from dalle.data.histograms import aspect, counts_of, plain, said, share, summary, tell_bars, tell_summary
from dalle.data.statistics import DatasetScanner, DatasetStats, decoded, examine, find_duplicates, tile
from dalle.io.files import make_directory, write_json, write_text
from dalle.io.images import captioned_grid
from dalle.layout import TokenLayout
from dalle.runs.args import ROOT
from dalle.runs.inputs import load_text_input
from dalle.types import BadSample, DataSource

NAMED = 100
"""Broken samples and duplicates in report.json; all broken ones are in skipped.jsonl, all duplicates in the list."""
PAIRS_SHOWN = 12
"""Duplicates on their sheet."""
COLUMNS = 8
"""Of a sheet."""
CAPTION = 100
"""Characters of a caption on a sheet."""


@dataclass(frozen=True)
class CheckDataArgs:
    """Reads every sample once and reports what is in the set, what is broken and what the filters would drop."""

    data: DataConfig = DataConfig(filters=PAPER_FILTERS)
    """The set, all of it, whatever is held out; and the filters to try, all of section 2.3 unless set."""
    out: Path | None = None
    """Directory of report and sheets; runs/check unless given."""
    text_tokenizer: Path | None = None
    """Text tokenizer (a run, a tokenizer.json, a youtokentome model) to count tokens with; not counted unless
    given."""
    text_len: int = TokenLayout().text_len
    """Text slots of the transformer to be, to tell the share of captions that would be cut."""
    sheet: int = 48
    """Images on sheet.png, spread over the whole set; 0 for none."""
    exclude_list: Path | None = None
    """File for the names of duplicates, all but the first of each image, for --data.filters.exclude-list."""
    max_broken: float | None = None
    """Share of broken samples above which the exit status is 1; 0 allows none. Unless given, it is as in training:
    more than --data.max-bad-fraction and more than a hundred samples."""

    def __post_init__(self):
        if self.sheet < 0:
            raise ValueError(f"sheet must be 0 (none) or more images, got {self.sheet}")
        if self.text_len < 2:
            raise ValueError(f"text_len must be 2 or more, got {self.text_len}")
        if self.max_broken is not None and not 0 <= self.max_broken <= 1:
            raise ValueError(f"max_broken is a share, so in [0, 1], got {self.max_broken}")


def check_data(run: CheckDataArgs) -> dict[str, Any]:
    """Reads all, writes <out>/report.json, skipped.jsonl and the sheets, prints the report.

    Raises:
        ValueError: no data, or more of it is broken than allowed; then everything is written nevertheless.
    """
    source = _open(run.data)
    out = make_directory(run.out or ROOT / "check")
    if run.exclude_list:
        make_directory(run.exclude_list.parent)
    workers = worker_count(run.data.workers, len(source))
    text = load_text_input(run.text_tokenizer) if run.text_tokenizer else None
    tiles = {i * len(source) // run.sheet for i in range(run.sheet)}
    examiner = DatasetScanner(source, _known(run.data.filters), text, tiles)
    found, skipped = _read(examiner, workers, out)
    twice = list(find_duplicates(source, found, workers))
    report = _report(run, source, found, skipped, twice, examiner.filters)
    write_json(out / "report.json", report)
    _draw(source, found, twice, out)
    if run.exclude_list:
        write_text(run.exclude_list, "".join(f"{plain(source.name(copy))}\n" for copy, _ in twice))
    _tell(report, run, out)
    _judge(report["broken"], run, str(skipped))
    return report


def _open(data: DataConfig) -> DataSource:
    if data.path is None:
        raise ValueError("no data: give --data.path, a folder, a table or tars (docs/data.md)")
    if data.path == "shapes":
        raise ValueError(
            "the shapes are drawn, there is nothing to check; give --data.path with your own images"
        )
    if data.val_path:
        print(f"note: {data.val_path} is not read; check it in a run of its own")
    return open_source(
        data.path,
        data.format,
        data.image_column,
        data.caption_column,
        images=data.image_root,
        cache=data.index_dir,
    )


def _known(filters: FilterConfig) -> FilterConfig:
    """The filters, without that of language where its detector is not installed."""
    try:
        if filters.language:
            language_detector(filters.language)
    except ImportError as error:
        print(f"note: {error}; until then that filter is not tried")
        return replace(filters, language=None)
    return filters


def _read(examiner: DatasetScanner, workers: int, out: Path) -> tuple[DatasetStats, BadSampleLog]:
    """All findings, the first broken samples among them; skipped.jsonl names every one."""
    source, found = examiner.source, DatasetStats()
    skipped = BadSampleLog(out / "skipped.jsonl", len(source), source.skipped, limit=1)
    found.skipped += source.skipped[:NAMED]
    with tqdm(total=len(source), desc="check", unit="image", disable=None) as bar:
        for stretch, more in enumerate(examine(examiner, workers)):
            found.add(more)
            skipped.add(more.skipped, stretch, len(source))
            found.skipped += more.skipped[: NAMED - len(found.skipped)]
            bar.update(len(more.numbers) + len(more.skipped))
    return found, skipped


def _judge(broken: dict[str, Any], run: CheckDataArgs, causes: str) -> None:
    """ValueError when more is broken than allowed."""
    if run.max_broken is None:
        check_bad_fraction(broken["samples"], broken["of"], run.data.max_bad_fraction, causes)
    elif broken["samples"] > run.max_broken * broken["of"]:
        raise ValueError(
            f"{broken['samples']} of {broken['of']} samples cannot be used, more than --max-broken "
            f"{run.max_broken:g}: {causes}"
        )


# ---------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------


def _report(
    run: CheckDataArgs,
    source: DataSource,
    found: DatasetStats,
    skipped: BadSampleLog,
    twice: Sequence[tuple[int, int]],
    filters: Sequence[str],
) -> dict[str, Any]:
    usable, seen = len(found.numbers), len(source) + len(source.skipped)
    small = sum(count for size, count in found.sizes.items() if min(size) < run.data.resolution)
    tokens = {}
    if run.text_tokenizer:
        room = TokenLayout(text_len=run.text_len).max_caption_len
        cut = sum(count for length, count in found.tokens.items() if length > room)
        tokens = {"tokens": summary(found.tokens) | {"room": room, "cut": share(cut, found.tokens.total())}}
    return {
        "path": run.data.path,
        "hash": source.hash,
        "samples": seen,
        "usable": usable,
        "captions": found.words.total(),
        "broken": share(skipped.counts.total(), seen)
        | {"causes": dict(skipped.counts.most_common()), "named": [_entry(skip) for skip in found.skipped]},
        "width": summary(counts_of(found.sizes, lambda size: size[0])),
        "height": summary(counts_of(found.sizes, lambda size: size[1])),
        "shorter_side": summary(counts_of(found.sizes, min)),
        "smaller_than_resolution": {"resolution": run.data.resolution} | share(small, usable),
        "aspect": dict(counts_of(found.sizes, aspect).most_common()),
        "words": summary(found.words),
        **tokens,
        "duplicates": share(len(twice), usable)
        | {"named": [{"copy": plain(source.name(i)), "of": plain(source.name(j))} for i, j in twice[:NAMED]]},
        "filters": {
            name: share(found.dropped[name], usable) | {"examples": plain(found.examples.get(name, []))}
            for name in filters
        },
        "all_filters": share(found.left_out, usable),
    }


def _entry(skip: BadSample) -> dict[str, str]:
    return {key: plain(value) for key, value in asdict(skip).items() if key != "index"}


# ---------------------------------------------------------------------------------------------
# Sheets, and the report on the screen
# ---------------------------------------------------------------------------------------------


def _draw(source: DataSource, found: DatasetStats, twice: Sequence[tuple[int, int]], out: Path) -> None:
    """sheet.png, and duplicates.png: each copy beside the first."""
    cells = []
    for pair in twice[:PAIRS_SHOWN]:
        cells += [(source.name(number), tile(decoded(source.read(number)))) for number in reversed(pair)]
    for name, shown in (("sheet.png", found.tiles), ("duplicates.png", cells)):
        (out / name).unlink(missing_ok=True)
        if shown:
            texts = [(_short(plain(text)), image) for text, image in shown]
            captioned_grid(texts, min(COLUMNS, len(texts))).save(out / name)


def _short(text: str) -> str:
    return text if len(text) <= CAPTION else text[: CAPTION - 3] + "..."


def _tell(report: dict[str, Any], run: CheckDataArgs, out: Path) -> None:
    broken, twice, small = report["broken"], report["duplicates"], report["smaller_than_resolution"]
    print(f"{run.data.path}: {report['usable']} images with {report['captions']} captions can be used")
    print(f"broken: {said(broken)}" + f"; all are named in {out / 'skipped.jsonl'}" * bool(broken["samples"]))
    for cause, count in broken["causes"].items():
        name = next((skip["name"] for skip in broken["named"] if skip["cause"] == cause), "")
        print(f"  {count:9,}  {cause}" + f", for example {name}" * bool(name))
    tell_summary("shorter side, pixels", report["shorter_side"])
    print(f"  smaller than --data.resolution {small['resolution']}, so that no crop fits: {said(small)}")
    tell_bars("shape, width : height", report["aspect"])
    tell_summary("words a caption", report["words"])
    if "tokens" in report:
        tell_summary("tokens a caption", report["tokens"])
        print(f"  longer than {report['tokens']['room']}, so cut: {said(report['tokens']['cut'])}")
    listed = (
        f"; written to {run.exclude_list}" if run.exclude_list else "; --exclude-list FILE writes their names"
    )
    print(f"there twice: {said(twice)}" + listed * bool(twice["samples"] or run.exclude_list))
    for pair in twice["named"][:3]:
        print(f"             {pair['copy']} shows what {pair['of']} shows")
    print(f"filters, tried out: {said(report['all_filters'])} would be left out by")
    for name, numbers in report["filters"].items():
        print(f"  {numbers['samples']:9,}  {name} ({numbers['share']:.2%})")
        for example in numbers["examples"][:3]:
            width, height = example["size"]
            print(
                f"             {example['name']}, {width} x {height}: {_short(' / '.join(example['captions']))}"
            )
    print(f"{out}: report.json" + ", sheet.png" * (out / "sheet.png").is_file())


def main() -> None:
    """Command line of check_data."""
    with cli_errors():
        check_data(parse(CheckDataArgs, description=__doc__))
