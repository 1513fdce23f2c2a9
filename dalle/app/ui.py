"""Web page in Gradio: sample images for a caption, rank them, complete an uploaded image."""

import html
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from gradio.image_utils import encode_image_to_base64
from PIL import Image

from dalle.app.guard import limit_jobs
from dalle.commands.app import AppArgs
from dalle.commands.sample import BEST_OF, SampleArgs
from dalle.data.image_decode import decode, open_image
from dalle.io.files import write_json
from dalle.io.images import resize_center_crop
from dalle.pipelines.completion import prefix_tokens
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, slug, write_images
from dalle.sampling import SamplingConfig

INTERVAL = 0.15  # seconds between partial images
PATIENCE = 5.0  # seconds after which a request is dropped whose visitor does not listen
SLOWEST = 30.0  # seconds that one message may take to reach a visitor
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no web fonts
CSS = """
.tiles, #best .grid-container {display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)) !important;}
.tiles img {width: 100%;}
.tiles img, #best img {image-rendering: pixelated;}
"""


class Page:
    """The page of a model, within the limits of the command line."""

    def __init__(self, model: DALLE, args: AppArgs):
        self.model, self.args, self.layout = model, args, model.transformer.layout

    def build(self) -> gr.Blocks:
        """Components and events; one request is sampled at a time, the others wait."""
        grid, defaults, ranked = self.layout.grid, SampleArgs(), self.model.scorer is not None
        with gr.Blocks(title="DALL-E", analytics_enabled=False, delete_cache=(900, 3600)) as page:
            gr.Markdown("# DALL-E\n{} x {} tokens".format(*grid))
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320):
                    caption = gr.Textbox(label="Caption", placeholder="a red circle above a blue square")
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary")
                        stop = gr.Button("Stop")
                    with gr.Row():
                        n = count_field("Images", defaults.num_images, self.args.max_images)
                        best_of = count_field("Best of", BEST_OF, self.args.max_candidates, ranked)
                        seed = gr.Number(
                            -1, label="Seed", info="-1: random", precision=0, minimum=-1, maximum=2**53
                        )
                    with gr.Accordion("Sampling", open=False):
                        temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
                        with gr.Row():
                            top_k = gr.Number(0, label="Top-k", info="0: all tokens", precision=0)
                            top_p = gr.Number(1, label="Top-p", info="1: all tokens", step=0.05)
                            guidance = gr.Number(1, label="Guidance", info="1: off", step=0.5)
                    with gr.Accordion("Complete an image", open=False, visible=grid[0] == grid[1] > 1):
                        image = upload_field("Image")
                        keep = count_field(
                            "Rows of tokens to keep", max(grid[0] // 2, 1), max(grid[0] - 1, 1)
                        )
                        kept = gr.HTML(elem_id="kept")
                results = result_fields("The images appear here, row by row.")
            private = {"api_visibility": "private", "show_progress": "hidden"}
            run = gr.on(
                [generate.click, caption.submit],
                self.generate,
                [caption, seed, n, best_of, temperature, top_k, top_p, guidance, image, keep],
                results,
                concurrency_limit=1,
                **private,
            )
            stopped = ("Stopped.", gr.update(visible=False))
            stop.click(lambda: stopped, None, results[:2], cancels=[run], queue=False, **private)
            gr.on([image.change, keep.change], self.preview, [image, keep], kept, **private)
        page.queue(max_size=32, api_open=False)
        limit_jobs(page._queue)
        return page

    def generate(
        self, caption, seed, n, best_of, temperature, top_k, top_p, guidance, image, rows, request: gr.Request
    ) -> Iterator[tuple]:
        """Status and partial images after each row; summary, best images and zip file after each batch."""
        if not wait_for(request):
            return
        with user_errors():
            best_of, seed = self.checked(caption, n, best_of, seed)
            sampling = SamplingConfig(temperature, top_k or None, top_p, None, guidance)
            sampling = replace(sampling, batch_size=self.model.auto_batch_size(sampling))
            record = {"n": n, "seed": seed, **asdict(sampling), "precision": self.model.precision}
            prefix = None
            if image:
                prefix = prefix_tokens(self.model, open_upload(image), rows)
                record |= {"image": Path(image).name, "rows": rows}
            with warnings.catch_warnings(record=True, action="always") as caught:
                steps = self.model.steps([caption], n, best_of, seed, sampling, prefix)
        for warning in caught:
            gr.Warning(html.escape(str(warning.message)))
        yield from self.show(steps, record, best_of, request)

    def checked(self, caption: str, n: int, best_of: int, seed: int | None) -> tuple[int, int]:
        """best_of, which is n without a scorer, and the seed, a random one for -1."""
        if len(caption) > self.args.max_caption:
            raise ValueError(f"the caption must have at most {self.args.max_caption} letters")
        seed = secrets.randbelow(2**31) if seed in (None, -1) else seed
        return best_of if self.model.scorer else n, seed

    def step_text(self, step: Any) -> str:
        """How far a batch is."""
        return f"row {step.tokens.shape[2] // self.layout.columns} of {self.layout.rows}"

    def show(self, steps: Iterator, record: dict, best_of: int, request: gr.Request) -> Iterator[tuple]:
        """What `generate` yields, of a sampling loop."""
        hidden = gr.update(visible=False)
        yield "Reading the caption ...", hidden, "", hidden, hidden
        start, shown, read = time.monotonic(), 0.0, time.monotonic()
        with TemporaryDirectory() as folder:
            for step in steps:
                now = time.monotonic()
                read = read if is_unread(request) else now
                if now > read + SLOWEST:
                    return
                if step.ranked:
                    images, text, archive = self.results(step.top[0].generation(), record, folder)
                    text = f"{text}, seed {record['seed']}, {time.monotonic() - start:.1f} s"
                    yield "", hidden, text, gr.update(value=images, visible=True), archive
                elif step.has_images and now - shown > INTERVAL and read == now:  # as fast as they are read
                    first = step.batch.candidates[0]
                    text = f"Candidates {first + 1} to {first + step.batch.wanted} of {best_of}"
                    text = f"{text}: {self.step_text(step)}"
                    yield text, gr.update(value=tiles(step.images), visible=True), *[gr.skip()] * 3
                    shown = time.monotonic()

    def results(self, generation: Generation, record: dict, folder: str) -> tuple:
        """Labeled images, a summary, and a zip file of what scripts/sample.py writes."""
        images, generated = generation.images, generation.num_generated
        labels = [f"candidate {candidate}" for candidate in generation.candidates]
        summary = f"{len(images)} images, unranked"
        if generation.scores:
            labels = [f"{i}: score {score:.3f}" for i, score in enumerate(generation.scores, 1)]
            summary = f"The best {len(images)} of {generated} images"
        with TemporaryDirectory() as files:
            record = {"prompt": generation.prompt, "best_of": generated, **record, "model": self.model.hash}
            record["images"] = write_images(generation, Path(files), self.model)
            write_json(Path(files, "sample.json"), record)
            stem = Path(folder, f"{slug(generation.prompt)}-{generation.seed}")
            archive = shutil.make_archive(str(stem), "zip", files)
        return list(zip(images, labels, strict=True)), summary, gr.update(value=archive, visible=True)

    def preview(self, path: str | None, rows: int) -> str:
        """HTML of the rows of an image that are kept, gray below."""
        if path is None:
            return ""
        with user_errors():
            scale = self.model.dvae.downsample_factor
            square = resize_center_crop(open_upload(path), self.layout.rows * scale)
            square.paste((128, 128, 128), (0, rows * scale, square.width, square.height))
            return tiles([square])


def wait_for(request: gr.Request) -> bool:
    """Waits until the visitor has received all messages; False for one that does not listen."""
    start = time.monotonic()
    while is_unread(request):
        if time.monotonic() > start + PATIENCE:
            return False
        time.sleep(0.05)
    return True


def is_unread(request: gr.Request) -> bool:
    """Whether the visitor has yet to receive a message."""
    sessions = request.request.app.get_blocks()._queue.pending_messages_per_session
    return request.session_hash in sessions and not sessions[request.session_hash].empty()


@contextmanager
def user_errors() -> Iterator[None]:
    """Shows ValueErrors on the page as text; Gradio logs other exceptions and shows no details."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None


def open_upload(path: str) -> Image.Image:
    """An uploaded image as RGB; errors have its name without the server's path."""
    name = Path(path).name
    return decode(open_image(Path(path).read_bytes(), name), name)


def tiles(images: list[Image.Image]) -> str:
    """HTML of images that need no file on the server."""
    tags = [f'<img src="{encode_image_to_base64(image)}">' for image in images]
    return f'<div class="tiles">{"".join(tags)}</div>'


def result_fields(text: str) -> list[Any]:
    """The column of what `show` yields: status, previews, summary, best images, download."""
    with gr.Column(scale=3, min_width=320):
        return [
            gr.Markdown(text),
            gr.HTML(elem_id="live", visible=False),
            gr.Markdown(),
            gr.Gallery(show_label=False, format="png", elem_id="best", visible=False),
            gr.DownloadButton("Download images and sample.json", visible=False),
        ]


def count_field(label: str, value: int, maximum: int, visible: bool = True) -> gr.Slider:
    """A field for 1 to `maximum`; Gradio refuses other values, also those of a forged request."""
    return gr.Slider(1, maximum, min(value, maximum), step=1, precision=0, label=label, visible=visible)


def upload_field(label: str) -> gr.File:
    """A file field for an image that never downloads an address for a forged request."""
    file = gr.File(label=label, file_types=["image"], elem_id=label.lower())
    move_to_cache = file.async_move_resource_to_block_cache

    async def move_upload(path: str) -> str:
        if "://" in path:
            raise gr.Error("expected an uploaded image, got an address", print_exception=False)
        return await move_to_cache(path)

    file.async_move_resource_to_block_cache = move_upload
    return file
