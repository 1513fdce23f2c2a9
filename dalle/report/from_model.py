"""Sections of a report for which the model itself is asked: samples, reranking, attention, codes, masks.

Each method gives HTML. ValueError says, in a line, why there is none and which command makes it.
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dalle import viz
from dalle.config import from_dict
from dalle.data import DataConfig, first_samples, open_dataset, sample_captions
from dalle.dvae import DVAE
from dalle.evals.best_of_n import best_of_n
from dalle.hub.registry import MODEL_REGISTRY, load_model
from dalle.io.format import read_config
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation
from dalle.report.folder import Folder
from dalle.report.from_files import dict_of, sampled
from dalle.report.html import escape, image_tag, images
from dalle.report.svg import Curve, chart, finite
from dalle.runs.args import MAKE_COMMANDS
from dalle.train.precision import resolve_device
from dalle.transformer import TransformerConfig
from dalle.types import ImageTextBatch, ImageTokenizer

if TYPE_CHECKING:
    from dalle.commands.report import ReportArgs

HELD_OUT = 64
"""Images by which the use of the codes is counted."""
SHOWN = 4
"""Images of a caption, and reconstructions."""
MASK_SIDE = 300
"""Pixels of a mask at the model's own size, at least."""


class Bench:
    """The model of a folder, and what it draws for the report. Nothing is opened before it is asked for."""

    def __init__(self, folder: Folder, run: "ReportArgs"):
        self.folder, self.run = folder, run

    @cached_property
    def model(self) -> DALLE:
        """The model directory, or the runs joined."""
        if not self.run.draw:
            raise ValueError("nothing is drawn under --no-draw")
        device = resolve_device(self.run.device)
        if self.folder.model:
            return DALLE.from_pretrained(self.folder.model, device)
        if not {"dvae", "transformer"} <= self.folder.runs.keys():
            raise ValueError(
                "needs a dVAE and a transformer, which are not both in this folder; make a model directory:\n"
                "python scripts/sample.py --prompt WORDS --save-model runs/model\npython scripts/report.py runs/model"
            )
        runs = self.folder.runs
        parts = {kind: load_model(runs[kind].folder, kind, device) for kind in MODEL_REGISTRY if kind in runs}
        return DALLE.from_parts(parts["dvae"], parts["transformer"], parts.get("clip"))

    @cached_property
    def dvae(self) -> ImageTokenizer:
        """That of the model; where the rest of it is not there or not whole, that of the dVAE's run or directory."""
        try:
            return self.model.dvae
        except ValueError:
            run = self.folder.runs.get("dvae")
            place = run.folder if run else self.folder.model
            if not self.run.draw or place is None:
                raise
        return load_model(place, "dvae", resolve_device(self.run.device)).model

    @cached_property
    def held_out(self) -> ImageTextBatch:
        """The first held-out pairs of the data that the dVAE, or the transformer, was trained on."""
        told = [self._record(kind).get("data", {}) for kind in ("dvae", "transformer")]
        named = [data for data in told if data.get("path")]
        if not named:
            raise ValueError("the folder does not say which images it was trained on")
        return first_samples(open_dataset(from_dict(DataConfig, named[0]), "held_out"), HELD_OUT)

    def _record(self, kind: str) -> dict[str, Any]:
        run = self.folder.runs.get(kind)
        return run.meta.get("run", {}) if run else {}

    @property
    def captions(self) -> list[str]:
        """Those asked for, else the first held-out ones."""
        if self.run.prompts:
            return list(self.run.prompts)
        try:
            return sample_captions(self.held_out, self.run.seed)[: self.run.captions]
        except ValueError as error:
            raise ValueError(f"no captions to draw ({error}); give --prompts") from None

    @property
    def temperature(self) -> float:
        """That asked for, else the quick start's or another evaluation's in the folder, else 1 as the paper."""
        if self.run.temperature is not None:
            return self.run.temperature
        reports = sorted(self.folder.evaluations.values(), key=lambda one: "caption_accuracy" not in one)
        known = [report.get("temperature") for report in reports]
        return next((float(one) for one in known if isinstance(one, int | float)), 1.0)

    @cached_property
    def drawn(self) -> list[Generation]:
        """All candidates of each caption, best first."""
        best_of = self.run.best_of if self.model.scorer else min(SHOWN, self.run.best_of)
        settings = {"seed": self.run.seed, "temperature": self.temperature, "truncate": True}
        return self.model.generate(self.captions, n=best_of, best_of=best_of, **settings)

    def samples(self) -> str:
        """The best images of each caption, and the worst, with their scores; then those found in the folder."""
        found, parts = list(sampled(self.folder)), []
        try:
            rows = [
                f"<div><h3>{escape(one.prompt)}</h3>{images(self._scored(one))}</div>" for one in self.drawn
            ]
            parts = [f'<p class="pale">{self._how()}</p><div class="rows">{"".join(rows)}</div>']
        except ValueError:
            if not found:
                raise
        return "".join(parts + found)

    def _how(self) -> str:
        ranked = (
            f"The best of {self.run.best_of} by CLIP's score"
            if self.model.scorer
            else "Unranked: there is no CLIP"
        )
        return escape(f"{ranked}; temperature {self.temperature:g}, seed {self.run.seed}.")

    @staticmethod
    def _scored(one: Generation) -> list[str]:
        if one.scores is None:
            return [image_tag(image, one.prompt, small=True) for image in one.images[:SHOWN]]
        said = [f"score {score:.3f}" for score in one.scores]
        said[-1] = f"worst of {len(said)}: {one.scores[-1]:.3f}"
        shown = [*range(len(said))][: SHOWN - 1] + [len(said) - 1] * (len(said) >= SHOWN)
        return [image_tag(one.images[i], one.prompt, said[i], small=True) for i in shown]

    def rerank(self) -> str:
        """What the best of N is worth: as an evaluation measured it, else by the candidates drawn here."""
        charts = []
        for name, report in self.folder.evaluations.items():
            for metric, by_n in dict_of(report.get("rerank")).items():
                curve = [
                    (int(n), value) for n, value in dict_of(by_n).items() if isinstance(value, int | float)
                ]
                if curve := finite(curve):
                    charts.append(
                        chart(
                            f"{metric} of the best ({name})",
                            [Curve(metric, curve, "dots")],
                            "N",
                            doubling=True,
                        )
                    )
        if not charts:
            if self.model.scorer is None:
                raise ValueError(f"no reranking: there is no CLIP; train one:\n{MAKE_COMMANDS['clip']}")
            table = np.array([one.scores for one in self.drawn])
            curve = list(best_of_n(table).items())
            title = f"CLIP's score of the best of N, mean of {len(table)} captions"
            charts.append(chart(title, [Curve("score", curve, "dots")], "N", doubling=True))
        said = "The mean over all ways to take N of the candidates (Figure 9c), ranked by CLIP."
        return f'<p>{said}</p><div class="cards">{"".join(charts)}</div>'

    def attention(self) -> str:
        """Of the best image of the first caption, for the last layer of each kind."""
        one = self.drawn[0]
        shown = viz.plot_attention(self.model, one.prompt, one.image_tokens[[0]], truncate=True)
        said = (
            "Where the last layer of each kind looks while it draws the token in the red square: the mean of its "
            "heads, brightest at the place of the most weight. A place shows the token that was read there."
        )
        return f"<p>{said}</p>" + image_tag(
            shown, f"attention per kind of layer for {one.prompt!r}", one.prompt
        )

    def codebook(self) -> str:
        """The codes most used on held-out images, each decoded alone; how often each is used; relaxed and hard."""
        model, parts = self.dvae, []
        try:
            pixels = torch.from_numpy(self.held_out.pixels)
            times = viz.count_codes(model, pixels.split(16))
            order = times.argsort(descending=True, stable=True)[: min(self.run.codes, int((times > 0).sum()))]
            first = f"The {len(order)} codes most used in {len(pixels)} held-out images, most used first"
            parts.append(image_tag(viz.plot_code_usage(times), "how often each code is used"))
            tokens = model.encode(pixels[:1].to(_device(model)))
            grid = tuple(side // model.downsample_factor for side in pixels.shape[2:])
            codes = viz.token_map(tokens, model.vocab_size, grid, cell=max(1, 192 // grid[0]))
            parts.append(
                image_tag(codes, "the codes of the first image", "codes of the first image, a color each")
            )
            if isinstance(model, DVAE):
                tau = self._record("dvae").get("objective", {}).get("tau", {}).get("end", 1 / 16)
                made = viz.plot_reconstructions(model, pixels[:SHOWN], tau)
                parts.append(
                    image_tag(
                        made, "reconstructions by relaxed and by hard codes", "relaxed against hard codes"
                    )
                )
        except ValueError as error:
            order = torch.arange(min(self.run.codes, model.vocab_size))
            first = f"The first {len(order)} of {model.vocab_size} codes, by number (their use is not known: {error})"
        sheet = viz.plot_codebook(
            model, order.tolist(), columns=16, scale=max(1, 20 // model.downsample_factor)
        )
        return f"<p>{escape(first)}; each decoded alone.</p>" + images([image_tag(sheet, first), *parts])

    def masks(self) -> str:
        """Figure 11 as the paper draws it, and at the model's own size."""
        config = self._transformer()
        layout = config.layout
        cell = max(1, MASK_SIDE // layout.seq_len)
        own = viz.plot_figure_11(layout, config.conv_kernel, cell)
        said = f"this model: {layout.text_len} text slots, {layout.rows} x {layout.columns} image slots"
        figures = [
            image_tag(
                viz.plot_figure_11(), "the masks of Figure 11", "as the paper draws them: 6 text, 4 x 4 image"
            )
        ]
        note = "A line is a query, a column a key; orange is text that it sees, blue are image slots."
        if not config.sparse:
            note += " This model has causal layers only: sparse is false."
        return f"<p>{note}</p>" + images([*figures, image_tag(own, said, said)])

    def _transformer(self) -> TransformerConfig:
        """The transformer's shape, without opening its weights."""
        if run := self.folder.runs.get("transformer"):
            place, part = run.folder, run.meta
        else:
            place = self.folder.model
            part = read_config(place)["parts"].get("transformer", {}) if place else {}
        if "config" not in part:
            raise ValueError(f"no masks: there is no transformer; train one:\n{MAKE_COMMANDS['transformer']}")
        return from_dict(TransformerConfig, part["config"], str(place))


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device
