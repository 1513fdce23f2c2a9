"""Draw images for a caption, rank them by CLIP, write the best (paper section 2.6).

python scripts/sample.py --model runs/quickstart/model --prompt "a red circle above a blue square on a white background"
python scripts/sample.py --prompt "..." --best-of 64 --keep 8       joins the newest parts under runs/
python scripts/sample.py --model 1.3B --prompt "..."                minDALL-E's folder, or its 1.3B.tar.gz
python scripts/sample.py --model pytorch_model_v3.bin --tokenizer bpe.model \
    --dvae vqgan.gumbelf8-sber.model.ckpt --prompt "..."            ruDALL-E
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle.config import cli_errors, parse
from dalle.hub.registry import LoadedModel, weights_hash
from dalle.io.files import make_directory, write_json
from dalle.pipelines.best_of_n import SamplingConfig, auto_batch_size
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, merge_generations
from dalle.pipelines.prompts_file import words
from dalle.pipelines.sample_prompts import FileSampler, write_images
from dalle.pretrained.load import holds_text_tokenizer, is_external_checkpoint, load_external_pipeline
from dalle.pretrained.openai_clip import load_scorer
from dalle.runs.args import ROOT, latest_run, load_stage, load_text_input
from dalle.train.precision import Precision, precision_label, resolve_device
from dalle.train.processes import Processes, processes
from dalle.types import Scorer


@dataclass(frozen=True)
class SampleArgs:
    """Draws images for a caption, or for each of a file, ranks them by CLIP and writes the best."""

    prompt: str = ""
    """The caption."""
    prompts: Path | None = None
    """Instead, a file with a caption a line, or of JSON lines with "prompt" or "caption" (.jsonl)."""
    model: Path | None = None
    """Model directory, or owner/name of one on the Hub; without it the parts below are joined. Or the file of another
    program's transformer, such as DALLE-pytorch's dalle.pt: then --tokenizer is needed, and --clip (a file) to rank;
    --dvae if none is in the file. Or minDALL-E's folder or 1.3B.tar.gz, which hold all but --clip."""
    tokenizer: Path | None = None
    """Text tokenizer, to be sure that it is the one the transformer was trained with."""
    dvae: Path | None = None
    """Run of the dVAE; the newest under runs/ unless given."""
    transformer: Path | None = None
    """Run of the transformer; the newest under runs/ unless given."""
    clip: Path | None = None
    """Run of the CLIP; the newest under runs/ unless given. Or a file of OpenAI's or open_clip's."""
    quick_gelu: bool | None = None
    """Activation of an open_clip file's CLIP, which no file tells: true for "-quickgelu" models, else false."""
    best_of: int = 64
    """Candidates to draw; the paper draws 512."""
    keep: int = 8
    """Images to write, best first."""
    seed: int = 0
    """With the caption and a candidate's number it fixes that image."""
    temperature: float = 1.0
    """1 as the paper; 0 takes the most likely tokens."""
    top_k: int | None = None
    """Draw among the k most likely tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that reach this probability only."""
    guidance: float | None = None
    """Strength of classifier-free guidance; for a model trained with caption dropout."""
    image: Path | None = None
    """An image whose top rows are kept; the model draws the rest."""
    rows: int | None = None
    """Rows of tokens to keep of --image; half of them unless given."""
    batch: int | None = None
    """Rows of every step of drawing; 16 on a CPU and 64 elsewhere, or less where memory is short, unless given."""
    together: int | None = None
    """Captions of --prompts drawn together; as many as fit with all their candidates unless given. 1 draws the same
    images, to the bit, for any number of candidates and captions."""
    chunk: int | None = None
    """Images decoded and scored at once; as many as half of the free memory holds unless given."""
    precision: Precision = "auto"
    """Of the transformer's matrices: fp32, bf16 or fp16; auto takes bf16 where the device has it in hardware."""
    int8: bool = False
    """Keep the transformer's matrices in 8 bits, a quarter of the bytes of fp32: on a CPU faster, on a GPU smaller.
    What it costs in likelihood is told by the benchmark `agreement`."""
    graph: bool = False
    """On CUDA, record a step of drawing as one graph of kernels and replay it."""
    compile: bool = False
    """Compile a step of drawing: faster, after half a minute or more of compiling."""
    truncate: bool = False
    """Cut a caption that is too long instead of refusing it."""
    out: Path | None = None
    """Directory for the images; a new one under runs/samples unless given. With --prompts it is needed, and a
    run that stopped goes on there."""
    save_model: Path | None = None
    """Also write the joined parts as a model directory here, for from_pretrained and --model."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""

    def check(self) -> None:
        """ValueError for words that do not go together, before any work."""
        if not self.prompt.strip() and not self.prompts:
            raise ValueError(
                'no caption; give --prompt "a red circle above a blue square on a white background"'
            )
        if self.prompt.strip() and self.prompts:
            raise ValueError("--prompts is a file of captions; leave out --prompt, or --prompts")
        if self.keep < 1 or self.best_of < self.keep:
            raise ValueError(
                f"best-of must be at least keep, and keep at least 1; got {self.best_of} and {self.keep}"
            )
        if self.rows is not None and self.image is None:
            raise ValueError("--rows says how much of an image to keep; give the image with --image")
        if self.prompts and self.image:
            raise ValueError("--image goes with one --prompt; leave out --prompts, or --image")
        if self.prompts and not self.out:
            raise ValueError("--prompts needs --out, where the run is found again if it stops")
        parts = [name for name in ("dvae", "transformer", "clip", "tokenizer") if getattr(self, name)]
        if self.foreign and not self.tokenizer and not holds_text_tokenizer(self.model):
            raise ValueError(
                f"{self.model} does not hold its text tokenizer; give --tokenizer, and --clip to rank"
            )
        if self.foreign and self.transformer:
            raise ValueError("--model is a transformer; leave out --transformer, or --model")
        if self.model and parts and not self.foreign:
            raise ValueError(f"--model holds every part; leave out --{' --'.join(parts)}, or --model")
        if self.quick_gelu is not None and not (self.clip and self.clip.is_file()):
            raise ValueError("--quick-gelu is of a CLIP's file; give it with --clip")
        SamplingConfig(**self.drawing)

    @property
    def foreign(self) -> bool:
        """Whether --model is another program's file or folder."""
        return self.model is not None and is_external_checkpoint(self.model)

    @property
    def drawing(self) -> dict[str, Any]:
        """What `DALLE.generate` takes as settings."""
        names = (
            "temperature",
            "top_k",
            "top_p",
            "guidance",
            "batch",
            "together",
            "chunk",
            "graph",
            "compile",
        )
        return {name: getattr(self, name) for name in names}


def sample(run: SampleArgs) -> Path:
    """One caption: 00.png, 01.png, ... (best first), grid.png and sample.json; never over another sample.

    A file of captions: see dalle/pipelines/sample_prompts.py. Under torchrun the processes share the candidates of one
    caption, and the captions of a file.
    """
    run.check()
    with processes() as group:
        return _sample_file(run, group) if run.prompts else _sample_one(run, group)


def _sample_file(run: SampleArgs, group: Processes) -> Path:
    model = open_model(run, group).to_precision(run.precision, run.int8)
    counts = {"n": run.keep, "best_of": run.best_of, "seed": run.seed, "truncate": run.truncate}
    facts = {"precision": precision_label(run.precision, run.int8, model.device)}
    if run.clip and run.clip.is_file():  # the model's hash names only what is our own
        facts["clip"] = weights_hash(model.scorer.model)
    sampler = FileSampler(model, run.prompts, run.out, counts | run.drawing, facts, group)
    try:
        count = sampler.run()
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command goes on in {run.out}") from None
    if group.rank == 0:
        print(f"{run.out}: {run.keep} of {run.best_of} images for each of {count} captions")
    return run.out


def _sample_one(run: SampleArgs, group: Processes) -> Path:
    out = _new_directory(run) if group.rank == 0 else None
    out = group.gather(out)[0]
    try:
        model = open_model(run, group)
        if run.save_model and group.rank == 0:
            model.save_pretrained(run.save_model)
        model = model.to_precision(run.precision, run.int8)
        _draw_into(out, model, run, group)
    except BaseException:
        if group.rank == 0 and not any(out.iterdir()):
            out.rmdir()
        raise
    return out


def _draw_into(out: Path, model: DALLE, run: SampleArgs, group: Processes) -> None:
    batch = run.batch or auto_batch_size(model.transformer, 1 if run.guidance in (None, 1) else 2)
    options = {
        "n": run.keep,
        "best_of": run.best_of,
        "seed": run.seed,
        "truncate": run.truncate,
        **run.drawing,
    }
    options["batch"] = min(group.gather(batch))
    asked = options | {"share": (group.rank, group.count), "progress": group.rank == 0}
    best_of, drawn = run.best_of if model.scorer else run.keep, []
    if run.image:
        rows = model.transformer.layout.rows // 2 if run.rows is None else run.rows
        options |= {"image": str(run.image), "rows": rows}
        if group.rank * options["batch"] < best_of:  # else the others draw all blocks
            drawn = [model.complete(run.prompt, run.image, rows, **asked)]
    else:
        drawn = model.generate([run.prompt], **asked)
    parts = [one for some in group.gather(drawn) for one in some]
    if group.rank:
        return
    generation = merge_generations(parts, run.keep)
    options["best_of"] = generation.drawn
    options["precision"] = precision_label(run.precision, run.int8, model.device)
    write_sample(out, model, generation, options)
    said = f", interrupted at {generation.drawn} of {run.best_of}" * generation.partial
    print(f"{out}: {len(generation.images)} of {generation.drawn} images for {run.prompt!r}{said}")


def open_model(run: SampleArgs, group: Processes) -> DALLE:
    """The model directory, or the parts joined, as they were saved; refuses parts that do not belong together."""
    device = group.device(resolve_device(run.device))
    if run.foreign:
        return _open_foreign(run, device)
    if run.model:
        return DALLE.from_pretrained(run.model, device)
    dvae, transformer = (load_stage(kind, getattr(run, kind), device) for kind in ("dvae", "transformer"))
    published = _published_clip(run, device)
    clip = _ranker(run, transformer, device) if published is None else None
    model = DALLE.from_parts(
        dvae, transformer, clip, load_text_input(run.tokenizer) if run.tokenizer else None
    )
    model.scorer = published or model.scorer
    return model


def _open_foreign(run: SampleArgs, device: torch.device) -> DALLE:
    """Another program's transformer, ranked by a published CLIP if one is given: a CLIP of ours reads our text ids."""
    scorer = _published_clip(run, device)
    if run.clip and scorer is None:
        raise ValueError(
            f"{run.clip} is a run of this library, whose CLIP reads another text; give a file of OpenAI's"
        )
    dvae = load_stage("dvae", run.dvae, device).model if run.dvae else None
    text = load_text_input(run.tokenizer) if run.tokenizer else None
    return load_external_pipeline(run.model, text, dvae, scorer, device)


def _published_clip(run: SampleArgs, device: torch.device) -> Scorer | None:
    """The CLIP of a file that --clip names."""
    return load_scorer(run.clip, device, run.quick_gelu) if run.clip and run.clip.is_file() else None


def _ranker(run: SampleArgs, transformer: LoadedModel, device: torch.device) -> LoadedModel | None:
    """The CLIP; where all candidates are kept and none is named, none is missed that is not there or does not fit."""
    if run.clip is not None or run.best_of != run.keep:
        return load_stage("clip", run.clip, device)
    try:
        found = latest_run("clip")
    except ValueError:
        print("note: there is no CLIP, so the images come unranked")
        return None
    clip = load_stage("clip", found, device)
    if clip.links["text_hash"] != transformer.links["text_hash"]:
        print(f"note: {found} was trained with another text tokenizer, so the images come unranked")
        return None
    return clip


def _new_directory(run: SampleArgs) -> Path:
    """An empty directory: --out, or runs/samples/<words of the caption>[-2, -3, ...]."""
    if run.out:
        if run.out.is_dir() and any(run.out.iterdir()):
            raise ValueError(f"{run.out} is not empty; give another --out")
        folder = run.out
    else:
        name = words(run.prompt)
        names = (name if i == 1 else f"{name}-{i}" for i in range(1, 10**6))
        folder = next(ROOT / "samples" / name for name in names if not (ROOT / "samples" / name).exists())
    return make_directory(folder)


def write_sample(out: Path, model: DALLE, generation: Generation, options: dict[str, Any]) -> None:
    """00.png, 01.png, ... (best first), grid.png and sample.json, which holds the options too."""
    records = write_images(model, generation, out, "", model.hash)
    shown = ("file", "candidate", "score", "log_likelihood")
    images = [{key: record[key] for key in shown} for record in records]
    write_json(
        out / "sample.json",
        {"prompt": generation.prompt, **options, "model": model.hash, "images": images},
    )


def main() -> None:
    """Command line of sample."""
    with cli_errors():
        sample(parse(SampleArgs, description=__doc__))
