"""Sections of a report that load the model: samples, reranking, attention, codebook, masks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dalle import viz
from dalle.config import from_dict
from dalle.dvae import DVAE
from dalle.evals.best_of_n import best_of_n
from dalle.io.files import read_json
from dalle.io.format import read_config
from dalle.io.images import load_image
from dalle.report.context import SHOWN, ReportContext
from dalle.report.folder import Contents, dict_or_empty
from dalle.report.page import Item, Text, curve_figure, image_figure
from dalle.transformer import TransformerConfig

MAX_FOLDERS = 3
"""Sample folders that are shown, the last by name."""


def samples(context: ReportContext) -> list[Item] | None:
    """The best images of each prompt and the worst, with scores; then those in the folder."""
    stored = list(_stored_samples(context.contents))
    try:
        return _generated(context) + stored
    except ValueError:
        if not stored:
            raise
        return stored


def _generated(context: ReportContext) -> list[Item]:
    ranked = f"The best of {context.args.best_of} by CLIP score"
    how = ranked if context.model.scorer else "Unranked: there is no CLIP"
    items: list[Item] = [Text(f"{how}; temperature {context.temperature:g}, seed {context.args.seed}.")]
    for one in context.generations:
        captions = [f"score {score:.3f}" for score in one.scores or ()] or [""] * len(one.images)
        if one.scores:
            captions[-1] = f"worst of {len(captions)}: {one.scores[-1]:.3f}"
        shown = [*range(len(captions))]
        shown = shown if len(shown) < SHOWN else [*shown[: SHOWN - 1], shown[-1]]
        items.append(Text(one.prompt, heading=True))
        items += [image_figure(one.images[i], one.prompt, captions[i], small=True) for i in shown]
    return items


def _stored_samples(contents: Contents) -> Iterator[Item]:
    """Images of scripts/sample.py, and the quick start's sheet."""
    for folder in contents.samples[-MAX_FOLDERS:]:
        if not (folder / "sample.json").is_file():
            yield Text(folder.name, heading=True)
            yield image_figure(
                load_image(folder / "sheet.png"), "the best image of each of the first captions"
            )
            continue
        try:
            yield from _sample_record(folder, read_json(folder / "sample.json"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'sample.json'} is not of scripts/sample.py ({error!r})") from None
    if (sheet := contents.root / "samples.png").is_file():
        yield Text("samples.png", heading=True)
        caption = "validation captions, on the left the first candidate, on the right the best"
        yield image_figure(load_image(sheet), caption, caption)


def _sample_record(folder: Path, record: dict[str, Any]) -> Iterator[Item]:
    yield Text(record["prompt"], heading=True)
    yield Text(f"the best of {record['best_of']}, temperature {record['temperature']}, seed {record['seed']}")
    for one in record["images"][:8]:
        score = "" if one["score"] is None else f"score {one['score']:.3f}"
        file = folder / Path(one["file"]).name  # never outside the folder
        yield image_figure(load_image(file), record["prompt"], score, small=True)


def reranking(context: ReportContext) -> list[Item] | None:
    """Score of the best of N: measured by an evaluation, else from the candidates of this report."""
    figures = []
    for name, report in context.contents.evaluations.items():
        for metric, by_n in dict_or_empty(report.get("rerank")).items():
            values = dict_or_empty(by_n).items()
            points = [(int(n), value) for n, value in values if isinstance(value, int | float)]
            figures.append(
                curve_figure(f"{metric} of the best ({name})", {metric: (points, "o-")}, "N", log2=True)
            )
    if not any(figures):
        if context.model.scorer is None:
            return None
        scores = np.array([one.scores for one in context.generations])
        title = f"CLIP score of the best of N, mean of {len(scores)} captions"
        figures = [curve_figure(title, {"score": ([*best_of_n(scores).items()], "o-")}, "N", log2=True)]
    text = "Mean over all ways to choose N of the candidates (Figure 9c), ranked by CLIP."
    return [Text(text), *filter(None, figures)]


def attention(context: ReportContext) -> list[Item]:
    """Of the best image of the first caption, for the last layer of each kind."""
    best = context.generations[0]
    image = viz.plot_attention(context.model, best.prompt, best.image_tokens[[0]], truncate=True)
    text = (
        "What the last layer of each kind attends to when it predicts the token in the red square: "
        "mean over heads, brightest at the largest weight."
    )
    return [Text(text), image_figure(image, f"attention per kind of layer for {best.prompt!r}", best.prompt)]


def codebook(context: ReportContext) -> list[Item]:
    """The most used codes decoded alone, code usage, a token map, relaxed against hard codes."""
    model, items = context.dvae, []
    try:
        pixels = torch.from_numpy(context.val_batch.pixels)
        counts = viz.count_codes(model, pixels.split(16))
        order = counts.argsort(descending=True, stable=True)[
            : min(context.args.num_codes, int((counts > 0).sum()))
        ]
        text = f"The {len(order)} most used codes of {len(pixels)} validation images, most used first"
        items.append(image_figure(viz.plot_code_usage(counts), "how often each code is used"))
        tokens = model.encode(pixels[:1].to(next(model.parameters()).device))
        grid = pixels.shape[2] // model.downsample_factor, pixels.shape[3] // model.downsample_factor
        token_map = viz.token_map(tokens, model.vocab_size, grid, cell=max(1, 192 // grid[0]))
        items.append(image_figure(token_map, "token map", "codes of the first image, a color each"))
        if isinstance(model, DVAE):
            tau = context.run_config("dvae").get("objective", {}).get("tau", {}).get("end", 1 / 16)
            image = viz.plot_reconstructions(model, pixels[:SHOWN], tau)
            items.append(image_figure(image, "reconstructions", "relaxed against hard codes"))
    except ValueError as error:
        order = torch.arange(min(context.args.num_codes, model.vocab_size))
        text = (
            f"The first {len(order)} of {model.vocab_size} codes, by number (their use is not known: {error})"
        )
    scale = max(1, 20 // model.downsample_factor)
    sheet = viz.plot_codebook(model, order.tolist(), columns=16, scale=scale)
    return [Text(f"{text}; each decoded alone."), image_figure(sheet, text), *items]


def masks(context: ReportContext) -> list[Item] | None:
    """Figure 11 at the paper's size and at the model's own."""
    run, folder = context.contents.runs.get("transformer"), context.contents.model
    part = run.meta if run else read_config(folder)["parts"].get("transformer", {}) if folder else {}
    if "model_config" not in part:
        return None
    config = from_dict(TransformerConfig, part["model_config"], str(run.folder if run else folder))
    layout = config.layout
    own = viz.plot_figure_11(layout, config.conv_kernel, max(1, 300 // layout.seq_len))
    note = "A row is a query, a column a key; visible text keys are orange, visible image keys blue."
    if not config.sparse:
        note += " This model has causal layers only: sparse is false."
    lengths = f"this model: {layout.text_len} text and {layout.rows} x {layout.columns} image positions"
    paper = image_figure(
        viz.plot_figure_11(), "the masks of Figure 11", "Figure 11: 6 text, 4 x 4 image positions"
    )
    return [Text(note), paper, image_figure(own, lengths, lengths)]
