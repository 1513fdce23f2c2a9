"""Generates images for a prompt, ranks them by CLIP, and writes the best (paper section 2.6).

python scripts/sample.py --model runs/quickstart/model --prompt "a red circle above a blue square"
python scripts/sample.py --prompt "..." --best-of 64            joins the newest models under runs/
python scripts/sample.py --model glide --prompt "..."             GLIDE: a model directory, or its files
python scripts/sample.py --model runs/quickstart/model --prompts-file prompts.txt --out runs/many
python scripts/sample.py --model 1.3B --prompt "..."                  minDALL-E's folder, or its 1.3B.tar.gz
python scripts/sample.py --model pytorch_model_v3.bin --text-tokenizer bpe.model \\
    --dvae vqgan.gumbelf8-sber.model.ckpt --prompt "..."              ruDALL-E
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

from tyro.conf import arg

from dalle.config import cli_errors, configuration, parse
from dalle.io.text import check_text
from dalle.sampling import DiffusionSampling, SamplingConfig

if TYPE_CHECKING:
    from dalle.pipelines.pipeline import Pipeline
    from dalle.train.distributed import Distributed

OWN_FILES = re.compile(r"\.lock|\.writable|\.partial-.+|grid\.png|\d+\.png")
"""Names in the directory of one sample before it has a sample.json."""
BEST_OF = 64
"""Candidates by default, but for GLIDE."""


@configuration
class SampleArgs:
    """What to sample, from which model, and where to write it."""

    prompt: str = ""
    """What the images show."""
    prompts_file: Path | None = None
    """A file of prompts instead: one per line, or JSON lines with "prompt" or "caption" (.jsonl)."""
    model: Path | None = None
    """Model directory, or its owner/name on the Hub; without it the models below are joined. Or an external
    transformer, such as DALLE-pytorch's dalle.pt: then --text-tokenizer is needed, --clip (a file) to rank,
    and --dvae if the file holds none. Or minDALL-E's folder or 1.3B.tar.gz, which hold all but --clip."""
    text_tokenizer: Path | None = None
    """Text tokenizer, checked against the one of the transformer's training."""
    dvae: Path | None = None
    """Run of the dVAE; by default the newest under runs/."""
    transformer: Path | None = None
    """Run of the transformer; by default the newest under runs/."""
    clip: Path | None = None
    """Run of the CLIP; by default the newest under runs/. Or a file in OpenAI's or open_clip's format."""
    quick_gelu: bool | None = None
    """Activation of an open_clip file's CLIP, which the file does not name: true for "-quickgelu" models."""
    num_images: Annotated[int, arg(aliases=["-n"])] = 8
    """Images to write, best first."""
    best_of: int | None = None
    """Candidates to generate, 512 in the paper; by default 64, and with GLIDE as many as images."""
    seed: int = 0
    """With the prompt and a candidate's index it fixes the image."""
    sampling: Annotated[SamplingConfig, arg(name="")] = SamplingConfig()
    """How tokens are sampled. GLIDE takes the guidance, by default 3, and the sizes of batches."""
    steps: int | None = None
    """Steps of GLIDE's base model; by default 100."""
    sampler: Literal["ancestral", "ddim", "dpm"] | None = None
    """Of GLIDE's base model; by default ancestral. dpm needs the fewest steps."""
    clip_guidance: float | None = None
    """Scale of guidance by a CLIP trained on noised images, of GLIDE; with it take --guidance 1."""
    upsample_steps: str | None = None
    """Steps of GLIDE's upsampler: a number, or a spacing; by default fast27."""
    inpaint: Path | None = None
    """Image for GLIDE to inpaint."""
    mask: Path | None = None
    """Image of the size of --inpaint, white where it is generated."""
    init_image: Path | None = None
    """Image to complete: its top rows are kept."""
    keep_rows: int | None = None
    """Rows of tokens to keep of --init-image; by default half of them."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the transformer's matrices; auto is bf16 where the device has it in hardware, else
    fp16 on CUDA with tensor cores, else fp32."""
    int8: bool = False
    """Store the transformer's matrices in 8 bits, a quarter of fp32: faster on a CPU, smaller on a GPU."""
    truncate: bool = False
    """Cut a prompt that is too long instead of refusing it."""
    out: Path | None = None
    """Directory for the images; default: a new one under runs/samples. With --prompts-file it is resumed."""
    log_likelihood: bool = False
    """Also record the log-likelihood of the prompt and of each image: one more pass over every image."""
    save_pretrained: Path | None = None
    """Also write the joined models as a model directory here."""
    device: str = "auto"
    """cuda, mps or cpu; auto is the first that is available."""


def check(args: SampleArgs, external: bool, holds_text: bool) -> None:
    """ValueError for flags that do not go together, or a prompt that is no text."""
    check_text(args.prompt)
    parts = [name for name in ("dvae", "transformer", "clip", "text_tokenizer") if getattr(args, name)]
    flags = " --".join(part.replace("_", "-") for part in parts)
    prompt, clip_file = args.prompt.strip(), args.clip and args.clip.is_file()
    for wrong, message in (
        (
            args.num_images < 1 or (args.best_of is not None and args.best_of < args.num_images),
            f"best-of must be at least num-images, 1 or more; got {args.best_of}, {args.num_images}",
        ),
        (not prompt and not args.prompts_file, 'no prompt; give --prompt "a red circle above a blue square"'),
        (prompt and args.prompts_file, "--prompts-file replaces --prompt; give one of them"),
        (args.keep_rows is not None and not args.init_image, "--keep-rows needs --init-image"),
        ((args.inpaint is None) != (args.mask is None), "--inpaint and --mask need each other"),
        (args.prompts_file and args.init_image, "--init-image needs one --prompt; leave out --prompts-file"),
        (args.prompts_file and args.inpaint, "--inpaint needs one --prompt; leave out --prompts-file"),
        (args.prompts_file and not args.out, "--prompts-file needs --out, from which it resumes"),
        (
            external and not args.text_tokenizer and not holds_text,
            f"{args.model} holds no text tokenizer; give --text-tokenizer, and --clip to rank",
        ),
        (external and args.transformer, "--model is a transformer; leave out --transformer, or --model"),
        (
            args.model and parts and not external,
            f"--model holds every model; leave out --{flags}, or --model",
        ),
        (
            args.quick_gelu is not None and not clip_file,
            "--quick-gelu is for a CLIP file; give it with --clip",
        ),
    ):
        if wrong:
            raise ValueError(message)


def main() -> None:
    """Runs the command line."""
    with cli_errors(parallel=True):
        sample(parse(SampleArgs, description=__doc__))


def sample(args: SampleArgs) -> Path:
    """Writes 00.png, 01.png, ... (best first), grid.png and sample.json, never over another sample.

    With --prompts-file see dalle/pipelines/sample_prompts.py. Under torchrun the processes share the
    candidates of one prompt, or the prompts of a file.
    """
    from dalle.io.files import make_directory
    from dalle.io.images import load_image
    from dalle.pipelines.sample_prompts import read_prompts
    from dalle.pretrained.load import holds_text_tokenizer, is_external_checkpoint
    from dalle.runs.open_model import open_model, sampling_settings
    from dalle.train.checkpoint_saver import LOCK
    from dalle.train.distributed import Distributed

    own = args.model is None or os.path.isfile(args.model / "config.json")
    external = not own and is_external_checkpoint(args.model)
    check(args, external, external and holds_text_tokenizer(args.model))
    if args.prompts_file:
        read_prompts(args.prompts_file)  # a bad line is found before a model is loaded
    if args.init_image:
        load_image(args.init_image)
    out, lock = args.out, None
    with Distributed.join(args.device) as group:
        if out is None:
            out = group.on_main(lambda: new_directory(args.prompt))
        elif group.is_main:  # a place that cannot be written fails before the work
            lock = None if args.prompts_file else claim(out)
            make_directory(out)
        try:
            model = open_model(args, external, group.device)
            sampling = sampling_settings(args, model)
            if args.best_of is None:
                args = replace(args, best_of=BEST_OF if sampling is args.sampling else args.num_images)
            if args.save_pretrained and group.is_main:
                model.save_pretrained(args.save_pretrained)
            model = model.to_precision(args.precision, args.int8)
            generate = _sample_file if args.prompts_file else _sample_prompt
            generate(args, model, sampling, out, group)
            if lock:  # the sample is complete
                (out / LOCK).unlink()
        except BaseException:
            if lock and [path.name for path in out.glob("*")] == [LOCK]:
                (out / LOCK).unlink()
            if group.is_main and out.is_dir() and not any(out.iterdir()):
                if args.out:
                    out.rmdir()
                else:
                    os.removedirs(out)  # runs/samples too, if there is no other sample
            raise
        finally:
            if lock:
                lock.close()
    return out


def claim(out: Path) -> TextIO:
    """Locks the directory of one sample: an empty one, or that of a killed command, which begins again."""
    from dalle.train.checkpoint_saver import LOCK, lock_directory

    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = [name for name in names if not OWN_FILES.fullmatch(name)]
    if foreign or (names not in ([], [".writable"]) and LOCK not in names):
        raise ValueError(f"{out} is not empty; give another --out")
    lock = lock_directory(out)
    for name in names:
        if name != LOCK:
            (out / name).unlink(missing_ok=True)  # the lock has removed .writable
    return lock


def new_directory(prompt: str) -> Path:
    """Creates a directory under runs/samples; samples that start at the same time have one each."""
    from dalle.io.files import make_directory
    from dalle.pipelines.generation import slug
    from dalle.runs import ROOT

    first = make_directory(ROOT / "samples") / slug(prompt)
    for number in count(1):
        out = first.with_name(f"{first.name}-{number}") if number > 1 else first
        with suppress(FileExistsError):
            out.mkdir()
            return out


def _sample_file(
    args: SampleArgs,
    model: Pipeline,
    sampling: SamplingConfig | DiffusionSampling,
    out: Path,
    group: Distributed,
) -> None:
    from dalle.hub.registry import weights_hash
    from dalle.pipelines.sample_prompts import sample_prompts

    facts = {"log_likelihood": args.log_likelihood, "precision": model.precision}
    if args.clip and args.clip.is_file():  # an external CLIP is not in the model's hash
        facts["clip"] = weights_hash(model.scorer.model)
    counts = (args.num_images, args.best_of, args.seed)
    try:
        prompts = sample_prompts(
            model, args.prompts_file, out, *counts, sampling, args.truncate, facts, group
        )
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command resumes in {out}") from None
    if group.is_main:
        print(f"{out}: {args.num_images} of {args.best_of} images for each of {prompts} prompts")


def _sample_prompt(
    args: SampleArgs,
    model: Pipeline,
    sampling: SamplingConfig | DiffusionSampling,
    out: Path,
    group: Distributed,
) -> None:
    from dalle.io.files import write_json
    from dalle.pipelines.completion import prefix_tokens
    from dalle.pipelines.generation import merge_generations, write_images
    from dalle.pipelines.inpainting import known_image

    batch_size = model.auto_batch_size(sampling, args.best_of // group.world_size)
    if group.world_size > 1:
        batch_size = min(group.gather_objects(batch_size))
    options = {"n": args.num_images, "best_of": args.best_of, "seed": args.seed, "truncate": args.truncate}
    options |= asdict(replace(sampling, batch_size=batch_size))
    shared = options | {"shard": (group.rank, group.world_size), "progress": group.is_main}
    if args.init_image:
        kept = model.transformer.layout.rows // 2 if args.keep_rows is None else args.keep_rows
        shared["prefix"] = prefix_tokens(model, args.init_image, kept)
        options |= {"image": str(args.init_image), "rows": kept}
    if args.inpaint:
        shared["known"] = known_image(model, args.inpaint, args.mask)
        options |= {"image": str(args.inpaint), "mask": str(args.mask)}
    generations = model.generate([args.prompt], **shared)
    if group.world_size > 1:
        parts = [part for shard in group.gather_objects(generations) for part in shard]
        if not group.is_main:
            return
        generations = [merge_generations(parts, args.num_images)]
    generation = generations[0]
    generated = generation.num_generated
    options |= {"best_of": generated, "precision": model.precision, "model": model.hash}
    options["images"] = write_images(generation, out, model, log_likelihood=args.log_likelihood)
    write_json(out / "sample.json", {"prompt": args.prompt, **options})
    note = f", interrupted at {generated} of {args.best_of}" if generated < generation.best_of else ""
    print(f"{out}: {len(generation.images)} of {generated} images for {args.prompt!r}{note}")
