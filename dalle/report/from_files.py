"""Sections of a report that are read from the folder's files: overview, curves, sheets, evaluations, configuration.

Each function gives HTML. ValueError says, in a line, why there is none and which command makes it.
"""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dalle.config import to_dict
from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import CHECKSUMS, read_json
from dalle.io.format import read_config
from dalle.io.images import load_image
from dalle.report.folder import Folder, TrainedRun
from dalle.report.html import escape, image_tag, images, said, table
from dalle.report.svg import Curve, chart, finite
from dalle.runs.args import MAKE_COMMANDS
from dalle.runs.kinds import TRAININGS
from dalle.viz.curves import CURVES, metric_points, plot_gradient_scales

SHEETS = {"dvae": "reconstructions", "transformer": "drawings", "clip": "retrieved"}
"""Images that the evaluations of a training leave."""
SAID = {
    "reconstructions": "Held-out images; beside each its reconstruction by relaxed codes, then by hard codes.",
    "drawings": "Held-out captions drawn with the same random numbers each time, at temperature 1.",
    "retrieved": "Under each caption its own image, and beside it the one of all that CLIP finds to fit best.",
}
RATES = ("grad_norm", "lr", "samples_per_sec")
"""Curves that every kind has, beside those of its losses."""
MOST_SHEETS = 4
MOST_SAMPLED = 3
"""Sample folders that are shown, the last by name."""
MOST_CHECKPOINTS = 3
"""Checkpoints whose hashes are told, the newest first."""


def overview(folder: Folder) -> str:
    """What was trained, how far, and the last numbers that were measured."""
    rows = []
    for kind, run in folder.runs.items():
        step = run.meta.get("step", run.lines[-1]["step"] if run.lines else 0)
        measured = {name: metric_points(run.lines, f"eval/{name}")[-1:] for name in CURVES[kind]}
        last = ", ".join(f"{name} {value:.4g}" for name, found in measured.items() for _, value in found)
        rows.append((kind, f"{step:,} of {run.meta.get('steps', step):,}", last or "none yet"))
    body = table(rows, ("training", "updates", "held-out images, last measured")) if rows else ""
    for name, report in folder.evaluations.items():
        facts = [
            f"{key} {said(value)}" for key, value in report.items() if not isinstance(value, dict | list)
        ]
        body += f"<p>{escape(name)}: {escape(', '.join(facts))}</p>"
    if not body:
        raise ValueError("no training to tell of; the folder holds none")
    return body


def curves(folder: Folder) -> str:
    """Every loss of every run, and its rates."""
    if not any(run.lines for run in folder.runs.values()):
        raise ValueError(f"no log.jsonl; a training writes one:\n{MAKE_COMMANDS['transformer']}")
    parts = []
    for kind, run in folder.runs.items():
        charts = [made for name in (*CURVES[kind], *RATES) if (made := _chart(run, name))]
        parts.append(f'<h3>{escape(kind)}</h3><div class="cards">{"".join(charts)}</div>' if charts else "")
        if any(isinstance(line.get("grad_scale_log2"), list) for line in run.lines):
            name = "log2 of each resblock's gradient scale (Figure 12)"
            parts.append(image_tag(plot_gradient_scales(run.folder), name, name))
    return "".join(parts)


def _chart(run: TrainedRun, name: str) -> str | None:
    found = [
        Curve("training", finite(metric_points(run.lines, name)), "line", 0),
        Curve("held out", finite(metric_points(run.lines, f"eval/{name}")), "dots", 1),
        Curve("chance", finite(metric_points(run.lines, f"chance/{name}")[:1]), "level", 2),
    ]
    found = [curve for curve in found if curve.points]
    return chart(name, found) if any(curve.style != "level" for curve in found) else None


def sheets(folder: Folder) -> str:
    """What evaluations drew as training went on, first to last."""
    parts = []
    for kind, run in folder.runs.items():
        found = run.sheets(SHEETS[kind])
        if found:
            shown = [
                found[i] for i in sorted({round(i * (len(found) - 1) / (MOST_SHEETS - 1)) for i in range(4)})
            ]
            figures = [
                image_tag(load_image(file), f"{SHEETS[kind]} at update {at}", f"update {at:,}")
                for at, file in shown
            ]
            parts.append(f"<h3>{escape(kind)}</h3><p>{SAID[SHEETS[kind]]}</p>{images(figures)}")
    if not parts:
        raise ValueError(
            "no images over time; trainings write them at each evaluation (the transformer where --dvae is given):\n"
            f"{MAKE_COMMANDS['dvae']}"
        )
    return "".join(parts)


def sampled(folder: Folder) -> Iterator[str]:
    """Images that scripts/sample.py left, with their scores, and the quick start's sheet."""
    for place in folder.samples[-MOST_SAMPLED:]:
        if not (place / "sample.json").is_file():
            shown = f"{place.name}: the best image of each of the first captions"
            yield f"<h3>{escape(place.name)}</h3>{image_tag(load_image(place / 'sheet.png'), shown, shown)}"
            continue
        try:
            yield _sample(place, read_json(place / "sample.json"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place / 'sample.json'} is not of scripts/sample.py ({error!r})") from None
    if (sheet := folder.root / "samples.png").is_file():
        shown = "samples.png: held-out captions, left the first candidate, right the best"
        yield f"<h3>samples.png</h3>{image_tag(load_image(sheet), shown, shown)}"


def _sample(place: Path, record: dict[str, Any]) -> str:
    figures = []
    for one in record["images"][:8]:
        score = "" if one["score"] is None else f"score {one['score']:.3f}"
        file = place / Path(one["file"]).name  # never out of the folder
        figures.append(image_tag(load_image(file), record["prompt"], score, small=True))
    how = f"the best of {record['best_of']}, temperature {record['temperature']}, seed {record['seed']}"
    return f'<h3>{escape(record["prompt"])}</h3><p class="pale">{escape(how)}</p>{images(figures)}'


def evaluation(folder: Folder) -> str:
    """Every number of every evaluation."""
    if not folder.evaluations:
        place = folder.model or "runs/quickstart/model"
        raise ValueError(
            "no evaluation; make one:\n"
            f"python scripts/evaluate.py --model {place} --metrics dvae transformer clip rerank "
            f"--json {folder.root / 'evaluation.json'}"
        )
    parts = []
    for name, report in folder.evaluations.items():
        parts.append(f"<h3>{escape(name)}</h3>")
        if {"caption_accuracy", "caption_accuracy_new_pairs"} <= report.keys():
            seen, new = dict_of(report["caption_accuracy"]), dict_of(report["caption_accuracy_new_pairs"])
            parts.append(
                "<p>Share of images that show what their caption says, by a judge that reads pixels.</p>"
            )
            rows = [(key, value, new.get(key, "")) for key, value in seen.items()]
            parts.append(table(rows, ("", "held-out scenes", "new pairs of color and shape")))
        parts.append(f'<div class="cards">{"".join(_blur(report))}</div>')
        rest = {key: value for key, value in report.items() if isinstance(value, dict | list)}
        parts.append(table([pair for pair in flat(rest) if not pair[0].startswith("caption_accuracy")]))
    return "".join(parts)


def _blur(report: dict[str, Any]) -> Iterator[str]:
    """Distance and score against the radius of the blur (Figure 9)."""
    by_radius = dict_of(dict_of(report.get("images")).get("blur"))
    metrics = dict.fromkeys(name for values in by_radius.values() for name in dict_of(values))
    for name in metrics:
        found = [(float(radius), values.get(name)) for radius, values in by_radius.items()]
        if all(isinstance(value, int | float) for _, value in found) and len(found := finite(found)) > 1:
            yield chart(name, [Curve(name, found, "dots")], "radius of the blur in pixels")


def dict_of(value: Any) -> dict[str, Any]:
    """The object of JSON that is expected here; empty for anything else."""
    return value if isinstance(value, dict) else {}


def flat(data: Any, name: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values of nested objects; a list is one value."""
    if not isinstance(data, dict):
        return [(name, data)]
    return [
        pair for key, inner in data.items() for pair in flat(inner, f"{name}.{key}" if name else str(key))
    ]


def configuration(folder: Folder) -> str:
    """Of each run: what differs from the defaults, which are the papers', then all of it."""
    parts = []
    for kind, run in folder.runs.items():
        if "run" not in run.meta:
            continue
        here, defaults = settings(run.meta["run"]), settings(to_dict(TRAININGS[kind][0]()))
        differs = {name for name, value in here.items() if value != defaults.get(name)}
        rows = [(name, here[name], defaults.get(name, "")) for name in here if name in differs]
        parts.append(f"<h3>{escape(kind)}: {len(rows)} of {len(here)} settings differ from the defaults</h3>")
        parts.append(table(rows, ("setting", "this run", "default")))
        marked = [i for i, name in enumerate(here) if name in differs]
        parts.append(
            f"<details><summary>all settings</summary>{table(list(here.items()), marked=marked)}</details>"
        )
    if not parts:
        raise ValueError(
            f"no configuration; a training's checkpoint holds it:\n{MAKE_COMMANDS['transformer']}"
        )
    return "".join(parts)


def settings(data: dict[str, Any]) -> dict[str, str]:
    """Dotted names and exact values, as JSON has them but for the quotes of words."""
    return {
        name: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for name, one in flat(data)
    }


def checkpoints(folder: Folder) -> str:
    """Which weights these are: the hashes beside each checkpoint, and those of the model directory."""
    parts = []
    for kind, run in folder.runs.items():
        for step in sorted(run.folder.glob("checkpoints/*/"))[: -MOST_CHECKPOINTS - 1 : -1]:
            if (step / CHECKSUMS).is_file():
                lines = (step / CHECKSUMS).read_text(encoding="utf-8").splitlines()
                rows = [line.split("  ", 1)[::-1] for line in lines if "  " in line]
                parts.append(
                    f"<h3>{escape(kind)}: {escape(step.name)}</h3>{table(rows, ('file', f'sha256 ({CHECKSUMS})'))}"
                )
        if links := [
            (key, value) for key, value in run.meta.get("links", {}).items() if isinstance(value, str)
        ]:
            parts.append(f"<p>The {escape(kind)} was trained with:</p>{table(links)}")
    if folder.model:
        config = read_config(folder.model)
        rows = [(f"{kind}: weights", part["hash"]) for kind, part in config["parts"].items()]
        rows += [(f"trained with: {name}", link) for name, link in config["links"].items()]
        parts.append(f"<h3>model directory</h3>{table(rows, ('config.json', 'sha256'))}")
    if not parts:
        raise ValueError(f"no checkpoint; a training writes them:\n{MAKE_COMMANDS['transformer']}")
    return "".join(parts)


def versions(folder: Folder) -> str:
    """What the runs say of their software and speed, and where this page was made."""
    rows: list[tuple[str, Any]] = []
    for kind, run in folder.runs.items():
        rows += [
            (f"{kind}: trained with {name}", value) for name, value in run.meta.get("versions", {}).items()
        ]
        for name in ("seconds", "max_memory_gib", "samples_per_sec", "tokens_per_sec", "mfu"):
            if logged := [value for _, value in metric_points(run.lines, name)]:
                rows.append((f"{kind}: {name}, median of the log", sorted(logged)[len(logged) // 2]))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [
        ("this page: python", platform.python_version()),
        ("this page: torch", torch.__version__),
        ("this page: system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"),
        ("this page: GPU", ", ".join(gpus) or "none"),
    ]
    return table(rows)


def kinds_missing(folder: Folder) -> list[str]:
    """A line for each part of a whole that was not trained here; none where the folder is one training's."""
    if folder.model or len(folder.runs) < 2:
        return []
    return [
        f"{kind}: not trained here; train one:\n{MAKE_COMMANDS[kind]}"
        for kind in MODEL_REGISTRY
        if kind not in folder.runs
    ]
