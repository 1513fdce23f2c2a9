"""Sections of a report: each a function from the context to figures, tables and text."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle import viz
from dalle.config import from_dict, to_dict
from dalle.dvae import DVAE
from dalle.evals.best_of_n import best_of_n
from dalle.io.files import CHECKSUMS, read_checksums, read_config, read_json
from dalle.io.images import load_image
from dalle.io.text import flatten
from dalle.report.context import ReportContext
from dalle.report.page import Figure, Item, Table, Text, curve_figure, image_figure
from dalle.runs.inputs import MAKE_COMMANDS
from dalle.runs.kinds import TRAININGS
from dalle.shapes.dataset import NEW_PAIRS, SHAPES
from dalle.transformer import TransformerConfig
from dalle.viz.curves import CURVES, metric_points

IMAGES_OVER_TIME = {"dvae": "reconstructions", "clip": "retrieval"}  # others: samples
Items = Iterator[Item | None]


def overview(context: ReportContext) -> Items:
    """Steps and last validation values of each run."""
    rows = []
    for kind, run in context.runs.items():
        step = run.meta.get("step", run.lines[-1]["step"] if run.lines else 0)
        last = {name: metric_points(run.lines, f"val/{name}")[-1:] for name in CURVES[kind]}
        values = [f"{name} {value:.4g}" for name, points in last.items() for _, value in points]
        rows.append((kind, f"{step:,} of {run.meta.get('steps', step):,}", ", ".join(values)))
    if rows:
        yield Table(rows, ("training", "steps", "last validation"))


def samples(context: ReportContext) -> Items:
    """The best images of each prompt and the worst, with scores."""
    ranking = "best and worst by CLIP score" if context.model.scorer else "unranked: there is no CLIP"
    settings = f"temperature {context.temperature:g}, seed {context.args.seed}"
    yield Text(f"Of {context.args.best_of} candidates, {ranking}; {settings}.")
    for one in context.generations:
        yield Text(one.prompt, heading=True)
        count = len(one.images)
        for i in sorted({*range(min(3, count)), count - 1}):
            label = f"score {one.scores[i]:.3f}" if one.scores else ""
            yield image_figure(one.images[i], one.prompt, label, "small")


def stored_samples(context: ReportContext) -> Items:
    """Images of scripts/sample.py in the last folders by name, and the quick start's sheet."""
    for folder in context.samples[-3:]:
        if not (folder / "sample.json").is_file():
            yield Text(folder.name, heading=True)
            yield image_figure(load_image(folder / "sheet.png"), "the best image of each caption")
            continue
        record = read_json(folder / "sample.json")
        yield Text(record["prompt"], heading=True)
        yield Text(", ".join(f"{name} {record[name]}" for name in ("best_of", "temperature", "seed")))
        for one in record["images"][:8]:
            image = load_image(folder / Path(one["file"]).name)  # never outside the folder
            label = "" if one["score"] is None else f"score {one['score']:.3f}"
            yield image_figure(image, record["prompt"], label, "small")
    if (sheet := context.root / "samples.png").is_file():
        caption = "validation captions, on the left the first candidate, on the right the best"
        yield Text(sheet.name, heading=True)
        yield image_figure(load_image(sheet), caption, caption)


def reranking(context: ReportContext) -> Items:
    """Score of the best of N: measured by an evaluation, else from the candidates of this report."""
    figures = [
        _value_figure(f"{metric} of the best ({name})", metric, by_n, "N", log2=True)
        for name, report in context.evaluations.items()
        for metric, by_n in report.get("rerank", {}).items()
        if isinstance(by_n, dict)
    ]
    if not any(figures) and context.model.scorer:
        scores = np.array([one.scores for one in context.generations])
        title = f"CLIP score of the best of N, mean of {len(scores)} captions"
        figures = [_value_figure(title, "score", best_of_n(scores), "N", log2=True)]
    if any(figures):
        yield Text("Mean over all ways to choose N of the candidates (Figure 9c), ranked by CLIP.")
        yield from figures


def _value_figure(title: str, name: str, values: dict, x_label: str, log2: bool = False) -> Figure | None:
    """A chart of {x: value}."""
    lines = [{"step": float(x), name: value} for x, value in values.items()]
    return curve_figure(title, name, lines, x_label, log2)


def attention(context: ReportContext) -> Items:
    """Of the best image of the first caption, for the last layer of each kind."""
    best = context.generations[0]
    image = viz.plot_attention(context.model, best.prompt, best.image_tokens[[0]], truncate=True)
    yield Text("What the last layer of each kind attends to when it predicts the token in the red square.")
    yield image_figure(image, "attention per kind of layer", best.prompt)


def curves(context: ReportContext) -> Items:
    """Losses, gradient norm, learning rate and speed of each run."""
    for kind, run in context.runs.items():
        yield Text(f"{kind}: training as a line, validation as dots, chance dotted", heading=True)
        for name in (*CURVES[kind], "grad_norm", "lr", "samples_per_sec"):
            yield curve_figure(name, name, run.lines)
        if any("grad_scale_log2" in line for line in run.lines):
            name = "log2 of each resblock's gradient scale (Figure 12)"
            yield image_figure(viz.plot_gradient_scales(run.folder), name, name)


def images_over_time(context: ReportContext) -> Items:
    """Four of the sheets <name>-STEP.png that evaluations during training wrote, first to last."""
    for kind, run in context.runs.items():
        files = sorted(run.folder.glob(f"{IMAGES_OVER_TIME.get(kind, 'samples')}-*.png"))
        for i in sorted({round(i * (len(files) - 1) / 3) for i in range(4)} if files else ()):
            yield image_figure(load_image(files[i]), files[i].stem, f"{kind}: {files[i].stem}")


def codebook(context: ReportContext) -> Items:
    """The most used codes decoded alone, code usage, a token map, relaxed against hard codes."""
    model, run = context.dvae, context.runs.get("dvae")
    codes = range(min(context.args.num_codes, model.vocab_size))
    caption = "The first codes by number, each decoded alone"
    if context.runs:
        pixels = torch.from_numpy(context.val_batch.pixels)
        counts = viz.count_codes(model, pixels.split(16))
        used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        codes = used[: len(codes)].tolist()
        caption = f"The {len(codes)} most used codes of {len(pixels)} validation images, each decoded alone"
    sheet = viz.plot_codebook(model, codes, columns=16, scale=max(1, 20 // model.downsample_factor))
    yield Text(f"{caption}.")
    yield image_figure(sheet, caption)
    if context.runs:
        tokens = model.encode(pixels[:1].to(next(model.parameters()).device))
        grid = pixels.shape[2] // model.downsample_factor, pixels.shape[3] // model.downsample_factor
        token_map = viz.token_map(tokens, model.vocab_size, grid, cell=max(1, 192 // grid[0]))
        yield image_figure(viz.plot_code_usage(counts), "how often each code is used")
        yield image_figure(token_map, "token map", "codes of the first image, a color each")
        if isinstance(model, DVAE):
            tau = run.meta["config"]["loss"]["tau"]["final"] if run else 1 / 16
            image = viz.plot_reconstructions(model, pixels[:4], tau)
            yield image_figure(image, "reconstructions", "relaxed against hard codes")


def masks(context: ReportContext) -> Items:
    """Figure 11 at the paper's size and at the model's own."""
    run, folder = context.runs.get("transformer"), context.model_directory
    part = run.meta if run else read_config(folder)["parts"].get("transformer", {}) if folder else {}
    if "model_config" not in part:
        return
    config = from_dict(TransformerConfig, part["model_config"], str(run.folder if run else folder))
    layout = config.layout
    own = viz.plot_figure_11(layout, config.conv_kernel, max(1, 300 // layout.seq_len))
    size = f"this model: {layout.text_len} text and {layout.rows} x {layout.columns} image positions"
    if not config.sparse:
        size += " (its layers are causal only)"
    yield Text("A row is a query, a column a key; visible text keys are orange, visible image keys blue.")
    yield image_figure(viz.plot_figure_11(), "Figure 11", "Figure 11: 6 text, 4 x 4 image positions")
    yield image_figure(own, "masks of this model", size)


def evaluation(context: ReportContext) -> Items:
    """Every number of every evaluation, and metrics against blur (Figure 9)."""
    for name, report in context.evaluations.items():
        yield Text(name, heading=True)
        by_radius = report.get("images", {}).get("blur", {})
        for metric in dict.fromkeys(key for values in by_radius.values() for key in values):
            values = {radius: values[metric] for radius, values in by_radius.items()}
            yield _value_figure(metric, metric, values, "radius of the blur in pixels")
        yield Table(list(flatten(report).items()))


def pairs(context: ReportContext) -> Items:
    """Share of right images of each color-shape pair, for an evaluation of the shapes."""
    for name, report in context.evaluations.items():
        if table := report.get("pair_accuracy"):
            shapes = [shape for shape in SHAPES if any(shape in row for row in table.values())]
            rows = []
            for color, shares in table.items():
                cells = [f"{shares[shape]:.2f}" if shape in shares else "" for shape in shapes]
                new = [(color, shape) in NEW_PAIRS for shape in shapes]
                rows.append((color, *(f"[{c}]" if n else c for c, n in zip(cells, new, strict=True))))
            yield Text(f"{name}: share of all candidates; in brackets the pairs that training never shows.")
            yield Table(rows, ("", *shapes))


def configuration(context: ReportContext) -> Items:
    """Settings of each run that differ from the defaults, which are the paper's; then all."""
    for kind, run in context.runs.items():
        if "config" in run.meta:
            args = TRAININGS[kind if kind in TRAININGS else "diffusion"][0]
            values, defaults = settings(run.meta["config"]), settings(to_dict(args()))
            rows = [(name, value, defaults.get(name, "")) for name, value in values.items()]
            marked = [i for i, (_, value, default) in enumerate(rows) if value != default]
            title = f"{kind}: {len(marked)} of {len(rows)} settings differ from the defaults"
            yield Text(title, heading=True)
            yield Table([rows[i] for i in marked], ("setting", "this run", "default"))
            yield Table(rows, marked=marked, summary="all settings")


def settings(data: dict[str, Any]) -> dict[str, str]:
    """Dotted names and exact values: JSON, but strings without quotes."""
    rows = flatten(data).items()
    return {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in rows}


def checkpoints(context: ReportContext) -> Items:
    """Hashes of the newest checkpoints of each run with its inputs, and of the model directory."""
    for kind, run in context.runs.items():
        for file in sorted(run.folder.glob(f"checkpoints/*/{CHECKSUMS}"), reverse=True)[:3]:
            yield Text(f"{kind}: {file.parent.name}", heading=True)
            yield Table(list(read_checksums(file.parent).items()), ("file", "sha256"))
        if inputs := run.meta.get("inputs"):
            yield Text(f"The {kind} was trained with:")
            yield Table(list(flatten(inputs).items()))
    if context.model_directory:
        config = read_config(context.model_directory)
        rows = [(f"{kind}: weights", part["hash"]) for kind, part in config["parts"].items()]
        rows += [(f"trained with: {name}", link) for name, link in config["inputs"].items()]
        yield Text("model directory", heading=True)
        yield Table(rows, ("config.json", "sha256"))


def versions(context: ReportContext) -> Items:
    """Software and speed of the runs, and the machine of this page."""
    rows: list[tuple[str, Any]] = []
    for kind, run in context.runs.items():
        rows += [(f"{kind}: {name}", value) for name, value in run.meta.get("versions", {}).items()]
        for name in ("seconds", "max_memory_gib", "samples_per_sec", "tokens_per_sec", "mfu"):
            if values := [value for _, value in metric_points(run.lines, name)]:
                rows.append((f"{kind}: {name}, median of the log", float(np.median(values))))
    system = f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}"
    rows += [("this page", system), ("processors, GPUs", f"{os.cpu_count()}, {torch.cuda.device_count()}")]
    yield Table(rows)


EVALUATE = "python scripts/evaluate.py --model runs/quickstart/model --json runs/quickstart/evaluation.json"
SECTIONS: list[tuple[str, Callable[[ReportContext], Items], str]] = [
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
    ("Pairs of color and shape", pairs, "python scripts/quickstart.py"),
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
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:  # JSON of another shape
            items, reason = [], f"unexpected contents in {context.root}: {error!r:.200}"
        if any(not isinstance(item, Text) or not item.heading for item in items):
            sections[title] = items
        else:
            reasons.setdefault(reason, []).append(title)
    return sections, [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
