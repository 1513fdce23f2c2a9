"""Sections of a report: each a function from the context to figures, tables and text."""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle import viz
from dalle.config import from_dict, to_dict
from dalle.dvae import DVAE
from dalle.evals.best_of_n import best_of_n
from dalle.io.files import CHECKSUMS, read_config, read_json
from dalle.io.images import load_image
from dalle.report.context import ReportContext
from dalle.report.page import Item, Table, Text, curve_figure, image_figure
from dalle.runs.inputs import MAKE_COMMANDS
from dalle.runs.kinds import TRAININGS
from dalle.transformer import TransformerConfig
from dalle.viz.curves import CURVES, metric_points

IMAGES_OVER_TIME = {"dvae": "reconstructions", "transformer": "samples", "clip": "retrieval"}


def overview(context: ReportContext) -> list[Item]:
    """Steps and last validation values of each run."""
    rows = []
    for kind, run in context.contents.runs.items():
        step = run.meta.get("step", run.lines[-1]["step"] if run.lines else 0)
        last = {name: metric_points(run.lines, f"val/{name}")[-1:] for name in CURVES[kind]}
        values = [f"{name} {value:.4g}" for name, points in last.items() for _, value in points]
        rows.append((kind, f"{step:,} of {run.meta.get('steps', step):,}", ", ".join(values)))
    return [Table(rows, ("training", "steps", "last validation"))] if rows else []


def samples(context: ReportContext) -> list[Item]:
    """The best images of each prompt and the worst, with scores."""
    ranking = "best and worst by CLIP score" if context.model.scorer else "unranked: there is no CLIP"
    settings = f"temperature {context.temperature:g}, seed {context.args.seed}"
    items: list[Item] = [Text(f"Of {context.args.best_of} candidates, {ranking}; {settings}.")]
    for one in context.generations:
        items.append(Text(one.prompt, heading=True))
        count = len(one.images)
        for i in sorted({*range(min(3, count)), count - 1}):
            label = f"score {one.scores[i]:.3f}" if one.scores else ""
            items.append(image_figure(one.images[i], one.prompt, label, "small"))
    return items


def stored_samples(context: ReportContext) -> list[Item]:
    """Images of scripts/sample.py in the last folders by name, and the quick start's sheet."""
    items: list[Item] = []
    for folder in context.contents.samples[-3:]:
        if not (folder / "sample.json").is_file():
            sheet = image_figure(
                load_image(folder / "sheet.png"), "the best image of each of the first captions"
            )
            items += [Text(folder.name, heading=True), sheet]
            continue
        record = read_json(folder / "sample.json")
        facts = (f"{name} {record[name]}" for name in ("best_of", "temperature", "seed"))
        items += [Text(record["prompt"], heading=True), Text(", ".join(facts))]
        for one in record["images"][:8]:
            image = load_image(folder / Path(one["file"]).name)  # never outside the folder
            label = "" if one["score"] is None else f"score {one['score']:.3f}"
            items.append(image_figure(image, record["prompt"], label, "small"))
    if (sheet := context.contents.root / "samples.png").is_file():
        caption = "validation captions, on the left the first candidate, on the right the best"
        items += [Text(sheet.name, heading=True), image_figure(load_image(sheet), caption, caption)]
    return items


def reranking(context: ReportContext) -> list[Item]:
    """Score of the best of N: measured by an evaluation, else from the candidates of this report."""
    figures = []
    for name, report in context.contents.evaluations.items():
        for metric, by_n in report.get("rerank", {}).items():
            if isinstance(by_n, dict):
                points = [(int(n), value) for n, value in by_n.items() if value is not None]
                title = f"{metric} of the best ({name})"
                figures.append(curve_figure(title, {metric: (points, "o-")}, "N", log2=True))
    if not any(figures):
        if context.model.scorer is None:
            return []
        scores = np.array([one.scores for one in context.generations])
        title = f"CLIP score of the best of N, mean of {len(scores)} captions"
        figures = [curve_figure(title, {"score": ([*best_of_n(scores).items()], "o-")}, "N", log2=True)]
    return [Text("Mean over all ways to choose N of the candidates (Figure 9c), ranked by CLIP."), *figures]


def attention(context: ReportContext) -> list[Item]:
    """Of the best image of the first caption, for the last layer of each kind."""
    best = context.generations[0]
    image = viz.plot_attention(context.model, best.prompt, best.image_tokens[[0]], truncate=True)
    text = "What the last layer of each kind attends to when it predicts the token in the red square."
    return [Text(text), image_figure(image, "attention per kind of layer", best.prompt)]


def curves(context: ReportContext) -> list[Item]:
    """Losses, gradient norm, learning rate and speed of each run."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        items.append(Text(kind, heading=True))
        for name in (*CURVES[kind], "grad_norm", "lr", "samples_per_sec"):
            lines = {
                "training": (metric_points(run.lines, name), "-"),
                "validation": (metric_points(run.lines, f"val/{name}"), "o-"),
                "chance": (metric_points(run.lines, f"baseline/{name}"), "level"),
            }
            items.append(curve_figure(name, lines))
        if any("grad_scale_log2" in line for line in run.lines):
            name = "log2 of each resblock's gradient scale (Figure 12)"
            items.append(image_figure(viz.plot_gradient_scales(run.folder), name, name))
    return items


def images_over_time(context: ReportContext) -> list[Item]:
    """Four of the sheets <name>-STEP.png that evaluations during training wrote, first to last."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        files = sorted(run.folder.glob(f"{IMAGES_OVER_TIME[kind]}-*.png"))
        for i in sorted({round(i * (len(files) - 1) / 3) for i in range(4)} if files else ()):
            items.append(image_figure(load_image(files[i]), files[i].stem, f"{kind}: {files[i].stem}"))
    return items


def codebook(context: ReportContext) -> list[Item]:
    """The most used codes decoded alone, code usage, a token map, relaxed against hard codes."""
    model, run, scale = context.dvae, context.contents.runs.get("dvae"), 20
    items: list[Item] = []
    codes = range(min(context.args.num_codes, model.vocab_size))
    caption = "The first codes by number, each decoded alone"
    if context.contents.runs:
        pixels = torch.from_numpy(context.val_batch.pixels)
        counts = viz.count_codes(model, pixels.split(16))
        used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        codes = used[: len(codes)].tolist()
        caption = f"The {len(codes)} most used codes of {len(pixels)} validation images, each decoded alone"
        tokens = model.encode(pixels[:1].to(next(model.parameters()).device))
        grid = pixels.shape[2] // model.downsample_factor, pixels.shape[3] // model.downsample_factor
        token_map = viz.token_map(tokens, model.vocab_size, grid, cell=max(1, 192 // grid[0]))
        items.append(image_figure(viz.plot_code_usage(counts), "how often each code is used"))
        items.append(image_figure(token_map, "token map", "codes of the first image, a color each"))
        if isinstance(model, DVAE):
            tau = run.meta["config"]["loss"]["tau"]["final"] if run else 1 / 16
            image = viz.plot_reconstructions(model, pixels[:4], tau)
            items.append(image_figure(image, "reconstructions", "relaxed against hard codes"))
    sheet = viz.plot_codebook(model, codes, columns=16, scale=max(1, scale // model.downsample_factor))
    return [Text(f"{caption}."), image_figure(sheet, caption), *items]


def masks(context: ReportContext) -> list[Item]:
    """Figure 11 at the paper's size and at the model's own."""
    run, folder = context.contents.runs.get("transformer"), context.contents.model
    part = run.meta if run else read_config(folder)["parts"].get("transformer", {}) if folder else {}
    if "model_config" not in part:
        return []
    config = from_dict(TransformerConfig, part["model_config"], str(run.folder if run else folder))
    layout = config.layout
    own = viz.plot_figure_11(layout, config.conv_kernel, max(1, 300 // layout.seq_len))
    size = f"this model: {layout.text_len} text and {layout.rows} x {layout.columns} image positions"
    if not config.sparse:
        size += " (its layers are causal only)"
    paper = image_figure(viz.plot_figure_11(), "Figure 11", "Figure 11: 6 text, 4 x 4 image positions")
    note = "A row is a query, a column a key; visible text keys are orange, visible image keys blue."
    return [Text(note), paper, image_figure(own, "masks of this model", size)]


def evaluation(context: ReportContext) -> list[Item]:
    """Every number of every evaluation, and metrics against blur (Figure 9)."""
    items: list[Item] = []
    for name, report in context.contents.evaluations.items():
        items.append(Text(name, heading=True))
        by_radius = report.get("images", {}).get("blur", {})
        for metric in dict.fromkeys(key for values in by_radius.values() for key in values):
            points = [(float(radius), values[metric]) for radius, values in by_radius.items()]
            points = [(radius, value) for radius, value in points if value is not None]
            items.append(curve_figure(metric, {metric: (points, "o-")}, "radius of the blur in pixels"))
        items.append(Table(flatten(report)))
    return items


def flatten(data: Any, name: str = "") -> list[tuple[str, Any]]:
    """Dotted names and plain values of nested objects; a list is one value."""
    if not isinstance(data, dict):
        return [(name, data)]
    prefix = f"{name}." if name else ""
    return [row for key, inner in data.items() for row in flatten(inner, f"{prefix}{key}")]


def configuration(context: ReportContext) -> list[Item]:
    """Settings of each run that differ from the defaults, which are the paper's; then all."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        if "config" in run.meta:
            values, defaults = settings(run.meta["config"]), settings(to_dict(TRAININGS[kind][0]()))
            rows = [(name, value, defaults.get(name, "")) for name, value in values.items()]
            marked = [i for i, (_, value, default) in enumerate(rows) if value != default]
            title = f"{kind}: {len(marked)} of {len(rows)} settings differ from the defaults"
            different = Table([rows[i] for i in marked], ("setting", "this run", "default"))
            items += [Text(title, heading=True), different]
            items.append(Table(rows, marked=marked, summary="all settings"))
    return items


def settings(data: dict[str, Any]) -> dict[str, str]:
    """Dotted names and exact values: JSON, but strings without quotes."""
    rows = flatten(data)
    return {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in rows}


def checkpoints(context: ReportContext) -> list[Item]:
    """Hashes of the newest checkpoints of each run with its inputs, and of the model directory."""
    items: list[Item] = []
    for kind, run in context.contents.runs.items():
        for file in sorted(run.folder.glob(f"checkpoints/*/{CHECKSUMS}"), reverse=True)[:3]:
            rows = [line.split("  ", 1)[::-1] for line in file.read_text(encoding="utf-8").splitlines()]
            items += [Text(f"{kind}: {file.parent.name}", heading=True), Table(rows, ("file", "sha256"))]
        if inputs := run.meta.get("inputs"):
            items += [Text(f"The {kind} was trained with:"), Table(flatten(inputs))]
    if context.contents.model:
        config = read_config(context.contents.model)
        rows = [(f"{kind}: weights", part["hash"]) for kind, part in config["parts"].items()]
        rows += [(f"trained with: {name}", link) for name, link in config["inputs"].items()]
        items += [Text("model directory", heading=True), Table(rows, ("config.json", "sha256"))]
    return items


def versions(context: ReportContext) -> list[Item]:
    """Software and speed of the runs, and the machine of this page."""
    rows: list[tuple[str, Any]] = []
    for kind, run in context.contents.runs.items():
        rows += [(f"{kind}: {name}", value) for name, value in run.meta.get("versions", {}).items()]
        for name in ("seconds", "max_memory_gib", "samples_per_sec", "tokens_per_sec", "mfu"):
            if values := [value for _, value in metric_points(run.lines, name)]:
                rows.append((f"{kind}: {name}, median of the log", float(np.median(values))))
    system = f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}"
    devices = f"{os.cpu_count()}, {torch.cuda.device_count()}"
    return [Table([*rows, ("this page", system), ("processors, GPUs", devices)])]


EVALUATE = "python scripts/evaluate.py --model runs/quickstart/model --json runs/quickstart/evaluation.json"
SECTIONS: list[tuple[str, Callable[[ReportContext], list[Item]], str]] = [
    ("Overview", overview, MAKE_COMMANDS["dvae"]),
    ("Samples", samples, ""),
    ("Stored samples", stored_samples, "python scripts/sample.py --prompt WORDS --out FOLDER"),
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


def make_sections(context: ReportContext) -> tuple[dict[str, list[Item]], list[str]]:
    """Items by title, and a reason for each section left out, with commands on further lines."""
    sections, reasons = {}, dict[str, list[str]]()
    for title, function, command in SECTIONS:
        reason = f"nothing in this folder; make it:\n{command}"
        try:
            items = [item for item in function(context) if item]
        except ValueError as error:
            items, reason = [], str(error)
        except (AttributeError, KeyError, TypeError) as error:  # JSON of another shape
            items, reason = [], f"unexpected contents in {context.contents.root}: {error!r}"
        if any(not isinstance(item, Text) or not item.heading for item in items):
            sections[title] = items
        else:
            reasons.setdefault(reason, []).append(title)
    return sections, [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
