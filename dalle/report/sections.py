"""Sections of a report: each a function from the context to figures, tables and text.

None means that the folder has nothing for the section; ValueError says what is damaged or missing.
"""

import json
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

from dalle import viz
from dalle.config import to_dict
from dalle.hub.registry import MODEL_REGISTRY
from dalle.io.files import CHECKSUMS
from dalle.io.format import read_config
from dalle.io.images import load_image
from dalle.report.context import ReportContext
from dalle.report.folder import TrainedRun, dict_or_empty
from dalle.report.model_sections import attention, codebook, masks, reranking, samples
from dalle.report.page import Figure, Item, Table, Text, curve_figure, format_value, image_figure
from dalle.runs.inputs import MAKE_COMMANDS
from dalle.runs.kinds import TRAININGS
from dalle.viz.curves import CURVES, metric_points

SHEETS = {
    "dvae": (
        "reconstructions",
        "Validation images and their reconstructions from relaxed and from hard codes.",
    ),
    "transformer": ("samples", "Samples for validation captions, with the same random numbers each time."),
    "clip": (
        "retrieval",
        "Under each caption its own image, and on the right the one that CLIP ranks first.",
    ),
}
"""The images that each kind's evaluations write, and what they show."""
MAX_CHECKPOINTS = 3
"""Checkpoints whose hashes are shown, the newest first."""


def overview(context: ReportContext) -> list[Item] | None:
    rows: list[tuple[str, ...]] = []
    for kind, run in context.contents.runs.items():
        step = run.meta.get("step", run.lines[-1]["step"] if run.lines else 0)
        last = {name: metric_points(run.lines, f"val/{name}")[-1:] for name in CURVES[kind]}
        values = ", ".join(f"{name} {value:.4g}" for name, points in last.items() for _, value in points)
        rows.append((kind, f"{step:,} of {run.meta.get('steps', step):,}", values or "none yet"))
    items: list[Item] = [Table(rows, ("training", "steps", "last validation"))] if rows else []
    for name, report in context.contents.evaluations.items():
        plain = {key: value for key, value in report.items() if not isinstance(value, dict | list)}
        items.append(
            Text(f"{name}: " + ", ".join(f"{key} {format_value(value)}" for key, value in plain.items()))
        )
    return items or None


def curves(context: ReportContext) -> list[Item] | None:
    """Losses, gradient norm, learning rate and speed of each run."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        names = (*CURVES[kind], "grad_norm", "lr", "samples_per_sec")
        figures: list[Item] = [figure for name in names if (figure := _metric_figure(run, name))]
        if any(isinstance(line.get("grad_scale_log2"), list) for line in run.lines):
            name = "log2 of each resblock's gradient scale (Figure 12)"
            figures.append(image_figure(viz.plot_gradient_scales(run.folder), name, name))
        items += [Text(kind, heading=True), *figures] if figures else []
    return items or None


def _metric_figure(run: TrainedRun, name: str) -> Figure | None:
    curves = {
        "training": (metric_points(run.lines, name), "-"),
        "validation": (metric_points(run.lines, f"val/{name}"), "o-"),
        "chance": (metric_points(run.lines, f"baseline/{name}")[:1], "level"),
    }
    return curve_figure(name, curves)


def images_over_time(context: ReportContext) -> list[Item] | None:
    """Sheets of the evaluations during training, first to last."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        name, text = SHEETS[kind]
        if sheets := run.sheets(name):
            items += [Text(kind, heading=True), Text(text)]
            for i in sorted({round(i * (len(sheets) - 1) / 3) for i in range(4)}):
                step, file = sheets[i]
                items.append(image_figure(load_image(file), f"{name} at step {step}", f"step {step:,}"))
    return items or None


def evaluation(context: ReportContext) -> list[Item] | None:
    """Every number of every evaluation."""
    items: list[Item] = []
    for name, report in context.contents.evaluations.items():
        items.append(Text(name, heading=True))
        seen, new = (dict_or_empty(report.get(f"caption_accuracy{end}")) for end in ("", "_new_pairs"))
        if seen and new:
            items.append(Text("Share of images that match their caption, judged from pixels."))
            rows = [(key, value, new.get(key, "")) for key, value in seen.items()]
            items.append(Table(rows, ("", "validation scenes", "new pairs of color and shape")))
        by_radius = dict_or_empty(dict_or_empty(report.get("images")).get("blur"))  # Figure 9
        for metric in dict.fromkeys(key for values in by_radius.values() for key in dict_or_empty(values)):
            points = [(float(radius), values.get(metric)) for radius, values in by_radius.items()]
            if all(isinstance(value, int | float) for _, value in points):
                items.append(curve_figure(metric, {metric: (points, "o-")}, "radius of the blur in pixels"))
        nested = {key: value for key, value in report.items() if isinstance(value, dict | list)}
        items.append(Table([row for row in flatten(nested) if not row[0].startswith("caption_accuracy")]))
    return [item for item in items if item] or None


def flatten(data: Any, name: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values of nested objects; a list is one value."""
    if not isinstance(data, dict):
        return [(name, data)]
    return [
        row for key, inner in data.items() for row in flatten(inner, f"{name}.{key}" if name else str(key))
    ]


def configuration(context: ReportContext) -> list[Item] | None:
    """Settings of each run that differ from the defaults, which are the paper's; then all."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        if "config" in run.meta:
            values, defaults = settings(run.meta["config"]), settings(to_dict(TRAININGS[kind][0]()))
            marked = [i for i, (name, value) in enumerate(values.items()) if value != defaults.get(name)]
            every = [(name, value, defaults.get(name, "")) for name, value in values.items()]
            title = f"{kind}: {len(marked)} of {len(values)} settings differ from the defaults"
            items += [
                Text(title, heading=True),
                Table([every[i] for i in marked], ("setting", "this run", "default")),
            ]
            items.append(Table([*values.items()], marked=marked, summary="all settings"))
    return items or None


def settings(data: dict[str, Any]) -> dict[str, str]:
    """Dotted names and exact values: JSON, but strings without quotes."""
    rows = flatten(data)
    return {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in rows}


def checkpoints(context: ReportContext) -> list[Item] | None:
    """Hashes of the files of each checkpoint, and of the model directory."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        for step in sorted(run.folder.glob("checkpoints/*/"))[: -MAX_CHECKPOINTS - 1 : -1]:
            if (step / CHECKSUMS).is_file():
                lines = (step / CHECKSUMS).read_text(encoding="utf-8").splitlines()
                rows = [line.split("  ", 1)[::-1] for line in lines if "  " in line]
                items += [
                    Text(f"{kind}: {step.name}", heading=True),
                    Table(rows, ("file", f"sha256 ({CHECKSUMS})")),
                ]
        inputs = [(name, link) for name, link in run.meta.get("inputs", {}).items() if isinstance(link, str)]
        items += [Text(f"The {kind} was trained with:"), Table(inputs)] if inputs else []
    if folder := context.contents.model:
        config = read_config(folder)
        rows = [(f"{kind}: weights", part["hash"]) for kind, part in config["parts"].items()]
        rows += [(f"trained with: {name}", link) for name, link in config["inputs"].items()]
        items += [Text("model directory", heading=True), Table(rows, ("config.json", "sha256"))]
    return items or None


def versions(context: ReportContext) -> list[Item]:
    """Software and speed of the runs, and the machine of this page."""
    rows: list[tuple[str, Any]] = []
    for kind, run in context.contents.runs.items():
        rows += [
            (f"{kind}: trained with {name}", value) for name, value in run.meta.get("versions", {}).items()
        ]
        for name in ("seconds", "max_memory_gib", "samples_per_sec", "tokens_per_sec", "mfu"):
            if values := sorted(value for _, value in metric_points(run.lines, name)):
                rows.append((f"{kind}: {name}, median of the log", values[len(values) // 2]))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [("this page: python", platform.python_version()), ("this page: torch", torch.__version__)]
    rows.append(
        ("this page: system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors")
    )
    return [Table([*rows, ("this page: GPU", ", ".join(gpus) or "none")])]


EVALUATE = "python scripts/evaluate.py --model runs/quickstart/model --json runs/quickstart/evaluation.json"
SECTIONS: list[tuple[str, Callable[[ReportContext], list[Item] | None], str]] = [
    ("Overview", overview, MAKE_COMMANDS["dvae"]),
    ("Samples", samples, ""),
    ("Reranking", reranking, MAKE_COMMANDS["clip"]),
    ("Attention", attention, ""),
    ("Curves", curves, MAKE_COMMANDS["transformer"]),
    ("Images over time", images_over_time, MAKE_COMMANDS["dvae"]),
    ("Codebook", codebook, ""),
    ("Masks", masks, MAKE_COMMANDS["transformer"]),
    ("Evaluation", evaluation, EVALUATE),
    ("Configuration", configuration, MAKE_COMMANDS["transformer"]),
    ("Checkpoints", checkpoints, MAKE_COMMANDS["transformer"]),
    ("Versions and hardware", versions, ""),
]
"""Title, function, and the command that makes what the section shows."""


def make_sections(context: ReportContext) -> tuple[list[tuple[str, list[Item]]], list[str]]:
    """(title, items) of the sections, and a reason for each one left out, with commands on further lines."""
    sections, reasons = [], dict[str, list[str]]()
    for title, function, command in SECTIONS:
        try:
            if items := function(context):
                sections.append((title, items))
                continue
            reason = f"nothing in this folder; make it:\n{command}"
        except ValueError as error:
            reason = str(error)
        reasons.setdefault(reason, []).append(title)
    missing = [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
    runs = context.contents.runs
    if len(runs) > 1 and not context.contents.model:
        untrained = [kind for kind in MODEL_REGISTRY if kind not in runs]
        missing += [f"{kind}: not trained here; train one:\n{MAKE_COMMANDS[kind]}" for kind in untrained]
    return sections, missing
