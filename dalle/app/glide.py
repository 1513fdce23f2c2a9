"""Web page of a GLIDE: sample images for a caption, or inpaint an uploaded one where a mask is white."""

import html
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import gradio as gr

from dalle.app.guard import limit_jobs
from dalle.app.ui import Page, count_field, open_upload, result_fields, upload_field, user_errors, wait_for
from dalle.commands.app import AppArgs
from dalle.commands.sample import SampleArgs
from dalle.pipelines.glide import GLIDE
from dalle.pipelines.inpainting import known_image
from dalle.sampling import DiffusionSampling


class GLIDEPage(Page):
    """The page of a model, within the limits of the command line."""

    def __init__(self, model: GLIDE, args: AppArgs):
        self.model, self.args = model, args

    def build(self) -> gr.Blocks:
        """Components and events; one request is sampled at a time, the others wait."""
        defaults, diffusion = DiffusionSampling(), self.model.base.config.diffusion
        with gr.Blocks(title="GLIDE", analytics_enabled=False, delete_cache=(900, 3600)) as page:
            gr.Markdown(f"# GLIDE\n{self.model.image_size} x {self.model.image_size} pixels")
            with gr.Row(equal_height=False):
                with gr.Column(scale=2, min_width=320):
                    caption = gr.Textbox(label="Caption", placeholder="a red circle above a blue square")
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary")
                        stop = gr.Button("Stop")
                    with gr.Row():
                        n = count_field("Images", SampleArgs().num_images, self.args.max_images)
                        ranked = self.model.scorer is not None
                        best_of = count_field("Best of", n.value, self.args.max_candidates, ranked)
                        seed = gr.Number(
                            -1, label="Seed", info="-1: random", precision=0, minimum=-1, maximum=2**53
                        )
                    with gr.Accordion("Sampling", open=False):
                        steps = count_field("Steps", defaults.steps, diffusion.steps)
                        scale = defaults.guidance if diffusion.caption_dropout else 1
                        guidance = gr.Number(scale, label="Guidance", info="1: off", step=0.5)
                        sampler = gr.Radio(["ancestral", "ddim", "dpm"], value="ancestral", label="Sampler")
                    with gr.Accordion("Inpaint an image", open=False):
                        gr.Markdown("The mask has the image's size and is white where it is generated.")
                        image, mask = upload_field("Image"), upload_field("Mask")
                results = result_fields("The images appear here, step by step.")
            private = {"api_visibility": "private", "show_progress": "hidden"}
            run = gr.on(
                [generate.click, caption.submit],
                self.generate,
                [caption, seed, n, best_of, steps, guidance, sampler, image, mask],
                results,
                concurrency_limit=1,
                **private,
            )
            stopped = ("Stopped.", gr.update(visible=False))
            stop.click(lambda: stopped, None, results[:2], cancels=[run], queue=False, **private)
        page.queue(max_size=32, api_open=False)
        limit_jobs(page._queue)
        return page

    def generate(
        self, caption, seed, n, best_of, steps, guidance, sampler, image, mask, request: gr.Request
    ) -> Iterator[tuple]:
        """Status and previews after each step; summary, best images and zip file after each batch."""
        if not wait_for(request):
            return
        with user_errors():
            best_of, seed = self.checked(caption, n, best_of, seed)
            sampling = DiffusionSampling(steps, guidance, sampler)
            sampling = replace(sampling, batch_size=self.model.auto_batch_size(sampling, best_of))
            known = None
            if image or mask:
                if not (image and mask):
                    raise ValueError("to inpaint, give both an image and its mask")
                known = known_image(self.model, open_upload(image), open_upload(mask))
            record = {"n": n, "seed": seed, **asdict(sampling), "precision": self.model.precision}
            with warnings.catch_warnings(record=True, action="always") as caught:
                loop = self.model.steps([caption], n, best_of, seed, sampling, known)
        for warning in caught:
            gr.Warning(html.escape(str(warning.message)))
        yield from self.show(loop, record, best_of, request)

    def step_text(self, step: Any) -> str:
        """How far the sampling is."""
        return "step {} of {}".format(*step.done)
