"""The web page: what stands where, and what happens at a click. The work itself is in app_work.py.

Everything comes from this server: the fonts are the system's, and nothing is told to anyone.
"""

import html
import inspect
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from types import ModuleType
from typing import Any

from PIL import Image

from dalle.app.jobs import (
    DEFAULTS,
    Limits,
    Request,
    Work,
    data_url,
    ended,
    kept_part,
    label,
    number,
    open_upload,
    standing,
    write_zip,
)
from dalle.pipelines.dalle import DALLE

CSS = """
.gradio-container {max-width: 1120px !important; margin: 0 auto;} .gradio-container main {width: 100%;}
#head h1 {margin: 0; font-weight: 600;} #head p {margin: 0; opacity: .75;}
.tiles, #best .grid-container {display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important;}
.tiles img {width: 100%; border-radius: 6px; display: block;}
.tiles img, #kept img, #best img {image-rendering: pixelated;}
#kept img {width: 192px; border-radius: 6px; display: block; margin: 0 auto;}
#live {padding: 0 8px;}
#best .grid-wrap {height: auto; min-height: 0; max-height: none; overflow: visible;}
#best .thumbnail-lg {aspect-ratio: auto; height: auto; display: block;}
#best .thumbnail-lg img {aspect-ratio: 1; height: auto;}
#best .caption-label {position: static; max-width: none; border: 0; border-radius: 0; text-align: center;}
#best:has(.preview) .gallery-container {min-height: 400px;}
#best .preview .media-button img {width: 256px; max-width: 100%; margin: 0 auto; object-fit: contain;}
footer {display: none !important;}
"""
EXAMPLE = "a red circle above a blue square on a white background"
BETWEEN = 0.15  # seconds; more images in a second than this tells are not sent to the browser
AGE = 3600  # seconds after which images of the server's temporary folder are removed
LOG = logging.getLogger(__name__)


def load_gradio() -> ModuleType:
    """Gradio; ImportError says how to come by it."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the web page needs gradio: pip install 'zeroshot-text2image[app]'") from error
    return gradio


class Page:
    """The page for a model.

    Args:
        model: draws.
        limits: what a visitor may ask for.
        facts: what else sample.json shall say, such as the precision.
    """

    def __init__(self, model: DALLE, limits: Limits, facts: dict[str, Any]):
        self.gr = load_gradio()
        self.model, self.limits, self.facts = model, limits, facts
        self.stops: dict[str, Event] = {}
        """Of each visitor who draws: set, it ends the drawing."""

    def look(self) -> dict[str, Any]:
        """Theme and style, for launch."""
        theme = self.gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="zinc",
            font=["system-ui", "sans-serif"],
            font_mono=["monospace"],
        )
        return {"theme": theme.set(block_info_text_color="*neutral_500"), "css": CSS}

    def build(self):
        """The `gradio.Blocks`."""
        gr = self.gr
        with gr.Blocks(
            title="DALL-E", analytics_enabled=False, fill_width=True, delete_cache=(AGE // 4, AGE)
        ) as page:
            gr.Markdown(f"# DALL-E\n{self._about()}", elem_id="head")
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320):
                    self._controls()
                with gr.Column(scale=3, min_width=320):
                    self._results()
            self._connect(page)
        return page.queue(default_concurrency_limit=1, max_size=32, api_open=False)

    def _about(self) -> str:
        layout = self.model.transformer.layout
        side = layout.rows * self.model.dvae.downsample_factor
        width = layout.columns * self.model.dvae.downsample_factor
        ranked = "ranked by CLIP" if self.model.scorer else "unranked: the model has no CLIP"
        return f"Images of {width} x {side} pixels, drawn as {layout.num_image_tokens} tokens, {ranked}."

    def _controls(self) -> None:
        gr, layout = self.gr, self.model.transformer.layout
        self.caption = gr.Textbox(label="Caption", placeholder=EXAMPLE, lines=2, max_lines=6, autofocus=True)
        with gr.Row():
            self.draw_button = gr.Button("Draw", variant="primary")
            self.stop_button = gr.Button("Stop", interactive=False)
        with gr.Row():
            self.n = gr.Number(DEFAULTS.num_images, label="Images", precision=0, min_width=80)
            self.best_of = gr.Number(
                DEFAULTS.best_of, label="Best of", precision=0, min_width=80, visible=bool(self.model.scorer)
            )
            self.seed = gr.Textbox(label="Seed", placeholder="random", min_width=80)
        with gr.Accordion("Sampling", open=False):
            self.temperature = gr.Slider(
                0,
                2,
                DEFAULTS.sampling.temperature,
                step=0.05,
                label="Temperature",
                info="1 as the paper; less gives likelier, smoother images",
            )
            with gr.Row():
                self.top_k = _blank(
                    gr, "Top-k", DEFAULTS.sampling.top_k, "all", "among the k likeliest tokens"
                )
                self.top_p = _blank(gr, "Top-p", DEFAULTS.sampling.top_p, "1", "among those that reach p")
                self.guidance = _blank(
                    gr, "Guidance", DEFAULTS.sampling.guidance, "off", "after caption dropout only"
                )
        with gr.Accordion("Complete an image", open=False, visible=layout.rows == layout.columns > 1):
            self.image = gr.File(label="Image", file_types=["image"], height=110, elem_id="image")
            _uploads_only(gr, self.image)
            self.rows = gr.Slider(
                1,
                max(layout.rows - 1, 2),
                max(layout.rows // 2, 1),
                step=1,
                label="Rows of tokens to keep",
                info=f"of {layout.rows}; the model draws what is grey",
            )
            self.kept = gr.HTML(elem_id="kept")

    def _results(self) -> None:
        gr = self.gr
        self.status = gr.Markdown("The images appear here, row by row.", elem_id="status")
        self.live = gr.HTML(visible=False, elem_id="live")
        self.best = gr.Gallery(
            show_label=False,
            columns=4,
            object_fit="contain",
            format="png",
            interactive=False,
            height="auto",
            buttons=["download", "fullscreen"],
            elem_id="best",
            visible=False,
        )
        self.download = gr.DownloadButton("Download images and sample.json", visible=False, size="sm")

    def _connect(self, page) -> None:
        gr = self.gr
        private = {"api_visibility": "private", "show_progress": "hidden"}
        switched = [self.draw_button, self.stop_button, self.caption]
        asked = [
            self.caption,
            self.seed,
            self.n,
            self.best_of,
            self.temperature,
            self.top_k,
            self.top_p,
            self.guidance,
            self.image,
            self.rows,
        ]
        shown = [self.status, self.live, self.best, self.download]
        begin, draw, end, stop = (
            self._for_visitor(one) for one in (self.begin, self.draw, self.end, self.stop)
        )
        begun = gr.on(
            [self.draw_button.click, self.caption.submit], begin, None, switched, queue=False, **private
        )
        drawn = begun.then(draw, asked, shown, concurrency_limit=1, **private)
        drawn.success(end, None, switched, queue=False, **private)
        drawn.failure(end, None, switched, queue=False, **private)
        self.stop_button.click(stop, None, [self.status, self.stop_button], queue=False, **private)
        preview = [self.image, self.rows]
        self.image.change(self.preview, preview, self.kept, **private)
        self.rows.change(self.preview, preview, self.kept, trigger_mode="always_last", **private)
        page.unload(self._for_visitor(self.leave))

    def _for_visitor(self, method: Callable) -> Callable:
        """A method as Gradio calls it, which takes the visitor's session first."""
        gr = self.gr

        def call(request: gr.Request, *values):
            return method(request.session_hash, *values)

        def loop(request: gr.Request, *values):
            yield from method(request.session_hash, *values)

        return loop if inspect.isgeneratorfunction(method) else call

    def begin(self, visitor: str) -> tuple:
        """A drawing is asked for: from now on it can be stopped, also while it waits for its turn."""
        if visitor not in self.stops or self.stops[visitor].is_set():
            self.stops[visitor] = Event()
        return self._switched(busy=True)

    def end(self, visitor: str) -> tuple:
        """The drawing has ended, whatever way."""
        self.stops.pop(visitor, None)
        return self._switched(busy=False)

    def _switched(self, busy: bool) -> tuple:
        """Updates of the buttons and the caption."""
        return tuple(self.gr.update(interactive=can) for can in (not busy, busy, not busy))

    def stop(self, visitor: str) -> tuple:
        """Ends the visitor's drawing after the row that is being drawn."""
        self.leave(visitor)
        return "Stopping ...", self.gr.update(interactive=False)

    def leave(self, visitor: str) -> None:
        """The visitor stops the drawing, or has gone."""
        if (event := self.stops.get(visitor)) is not None:
            event.set()

    def preview(self, image: str | None, rows: int) -> str:
        """What is kept of the image."""
        if image is None:
            return ""
        with self._told():
            return _tile(
                kept_part(open_upload(Path(image), self.limits), int(rows), self.model), "what is kept"
            )

    def draw(
        self, visitor: str, caption, seed, n, best_of, temperature, top_k, top_p, guidance, image, rows
    ) -> Iterator[tuple]:
        """Rows as they are drawn, the best so far after each block, and the download at the end."""
        image = Path(image) if image else None
        stop = self.stops.setdefault(visitor, Event())
        with self._told():
            if stop.is_set():
                yield self._shown("Stopped before it began.")
                return
            asked = Request(
                caption or "",
                number("seed", seed, int),
                n,
                best_of,
                temperature,
                number("top_k", top_k, int),
                number("top_p", top_p, float),
                number("guidance", guidance, float),
                image,
                int(rows) if image else None,
            )
            work = Work(self.model, asked, self.limits)
            for warning in work.warnings:
                self.gr.Warning(html.escape(warning))
            yield from self._drawing(work, stop)

    def _drawing(self, work: Work, stop: Event) -> Iterator[tuple]:
        layout, began, sent = self.model.transformer.layout, time.monotonic(), 0.0
        yield self._shown("Reading the caption ...")
        for progress in work.steps(stop):
            if progress.ranked or time.monotonic() - sent > BETWEEN:
                told = standing(progress, layout.columns, layout.rows)
                ranked = work.generation if progress.ranked else None
                yield self._shown(told, progress.images, ranked)
                sent = time.monotonic()
        if work.generation is None:
            yield self._shown("Stopped before the first images were whole.")
            return
        told = ended(work.generation, time.monotonic() - began)
        with TemporaryDirectory() as folder:
            path = write_zip(Path(folder), self.model, work.generation, work.options(self.facts))
            yield self._shown(told, generation=work.generation, download=str(path))

    def _shown(
        self, told: str, live: list[Image.Image] | None = None, generation=None, download: str | None = None
    ) -> tuple:
        """Updates of the status, the images at work, the gallery and the download."""
        update = self.gr.update
        tiles = "".join(_tile(image, f"image {i + 1}, being drawn") for i, image in enumerate(live or []))
        gallery = update()
        if generation is not None:
            labels = [label(generation, i) for i in range(len(generation.images))]
            gallery = update(value=list(zip(generation.images, labels, strict=True)), visible=True)
        elif live is None:
            gallery = update(value=None, visible=False)
        at_work = update(value=f'<div class="tiles">{tiles}</div>', visible=bool(tiles))
        return told, at_work, gallery, update(value=download, visible=download is not None)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A visitor's mistake as a message on the page; a bug as one too, with its traceback in the server's
        log."""
        try:
            yield
        except ValueError as error:
            raise self.gr.Error(html.escape(str(error)), print_exception=False) from None
        except Exception as error:
            LOG.exception("the page failed")
            message = f"this failed ({type(error).__name__}); the server's log says more"
            raise self.gr.Error(message, print_exception=False) from None


def _tile(image: Image.Image, alt: str) -> str:
    return f'<img src="{data_url(image)}" alt="{alt}">'


def _blank(gr: ModuleType, name: str, value: float | None, blank: str, info: str):
    """A field for a number that may be left blank; Gradio's own shows a blank as 0."""
    shown = "" if value is None else f"{value:g}"
    return gr.Textbox(shown, label=name, placeholder=blank, info=info, min_width=80)


def _uploads_only(gr: ModuleType, file: Any) -> None:
    """Keeps a file field from fetching from another server what a hand-made request names there."""
    take = file.async_move_resource_to_block_cache

    async def take_upload(path: str | None) -> str | None:
        if "://" in str(path or ""):
            raise gr.Error("an image is uploaded, not fetched from an address", print_exception=False)
        return await take(path)

    file.async_move_resource_to_block_cache = (
        take_upload  # a subclass would make Gradio write a stub file beside us
    )
