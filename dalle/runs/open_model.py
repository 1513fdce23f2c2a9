"""The model that a command samples from, and the settings that it takes.

A model directory, files of other programs, or runs joined.
"""

from dataclasses import asdict

import torch

from dalle.commands.sample import SampleArgs
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.open import open_pipeline
from dalle.pipelines.pipeline import Pipeline
from dalle.pretrained.load import load_external_pipeline
from dalle.pretrained.openai_clip import load_scorer
from dalle.runs.inputs import latest_run, load_stage, load_text_input
from dalle.sampling import DiffusionSampling, SamplingConfig

OF_BOTH = ("guidance", "batch_size", "prompts_per_batch")
OF_TOKENS = ("init_image", "log_likelihood", "int8")
OF_DIFFUSION = ("steps", "sampler", "clip_guidance", "upsample_steps")


def open_model(args: SampleArgs, external: bool, device: torch.device) -> Pipeline:
    """The model directory, the external model, or the joined runs; ValueError if they do not fit."""
    scorer = load_scorer(args.clip, device, args.quick_gelu) if args.clip and args.clip.is_file() else None
    text = load_text_input(args.text_tokenizer) if args.text_tokenizer else None
    if external:
        if args.clip and scorer is None:
            raise ValueError(f"{args.clip} is a run, whose CLIP reads another text; give a file of OpenAI's")
        dvae = load_stage("dvae", args.dvae, device).model if args.dvae else None
        return load_external_pipeline(args.model, text, dvae, scorer, device)
    if args.model:
        rounding = {} if args.save_pretrained else {"precision": args.precision, "int8": args.int8}
        return open_pipeline(str(args.model), device, inpainting=args.inpaint is not None, **rounding)
    dvae, transformer = (load_stage(kind, getattr(args, kind), device) for kind in ("dvae", "transformer"))
    clip, optional = None, args.clip is None and args.best_of == args.num_images
    if scorer is None:
        try:
            path = args.clip or latest_run("clip")
        except ValueError:
            if not optional:
                raise
            print("note: there is no CLIP, so the images are unranked")
        else:
            clip = load_stage("clip", path, device)
    if optional and clip and clip.inputs["text_hash"] != transformer.inputs["text_hash"]:
        print(f"note: the images are unranked: {clip.source} was trained with another text tokenizer")
        clip = None
    model = DALLE.from_parts(dvae, transformer, clip, text)
    model.scorer = scorer or model.scorer
    return model


def sampling_settings(args: SampleArgs, model: Pipeline) -> SamplingConfig | DiffusionSampling:
    """What the model's sampling is given; ValueError for flags of the other pipeline."""
    tokens = model.Sampling is SamplingConfig
    names = (*OF_DIFFUSION, "inpaint") if tokens else OF_TOKENS
    foreign = [name for name in names if getattr(args, name) not in (None, False)]
    if not tokens:
        settings = asdict(args.sampling).items()
        foreign += [n for n, value in settings if n not in OF_BOTH and value != getattr(SamplingConfig, n)]
    if foreign:
        flag, kind = foreign[0].replace("_", "-"), type(model).__name__
        raise ValueError(f"--{flag} is not for a {kind}, and {args.model} is one; leave it out")
    if tokens:
        return args.sampling
    given = {name: getattr(args, name) for name in OF_DIFFUSION}
    given |= {name: getattr(args.sampling, name) for name in OF_BOTH}
    return DiffusionSampling(**{name: value for name, value in given.items() if value is not None})
