"""Quick start: every stage of DALL-E on shapes, accuracy of its samples, and the report."""

import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.quickstart import QuickstartArgs
from dalle.commands.report import ReportArgs, write_report
from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import CONFIGS, load
from dalle.evals.shapes_accuracy import ShapesSamples, caption_accuracy, pair_accuracy
from dalle.hub.model_card import write_card
from dalle.hub.registry import load_model
from dalle.io.files import check_result, make_directory, write_json
from dalle.io.images import captioned_grid, image_grid, to_pil
from dalle.pipelines.dalle import DALLE
from dalle.runs import ROOT
from dalle.runs.inputs import is_complete
from dalle.train.loggers import peak_memory, read_log
from dalle.train.precision import resolve_device
from dalle.viz.curves import plot_losses

KINDS = ("dvae", "transformer", "clip")


def quickstart(run: QuickstartArgs) -> dict[str, Any]:
    """Run every stage; write samples, reconstructions and losses as PNG, report.json, report.html, model/."""
    out = _prepare(run.out)
    seconds: dict[str, float] = {}
    resumed = any(out.iterdir())
    common: dict[str, Any] = {"seed": run.seed, "device": run.device}
    text_run, dvae_run, encode_run = first_stages(run.configs)
    transformer_run = load(TrainTransformerArgs, [run.configs / "transformer" / "shapes.yaml"])
    clip_run = load(TrainCLIPArgs, [run.configs / "clip" / "shapes.yaml"])

    with _stage("tokenizer", seconds):
        # not trained again: the result may differ (dalle/text/train_bpe.py)
        if not (out / "text" / "text_tokenizer.json").exists():
            train_tokenizer(replace(text_run, out=out / "text", captions=4000))
    with _stage("dvae", seconds):
        train_dvae(replace(dvae_run, out=out / "dvae", **common))
    with _stage("encode", seconds):
        encode_images(replace(encode_run, out=out / "tokens", dvae=out / "dvae", **common))
    common["text_tokenizer"] = out / "text"
    with _stage("transformer", seconds):
        train_transformer(replace(transformer_run, out=out / "transformer", tokens=out / "tokens", **common))
    with _stage("clip", seconds):
        train_clip(replace(clip_run, out=out / "clip", **common))
    with _stage("sample", seconds):
        device = resolve_device(run.device)
        model = DALLE.from_parts(*(load_model(out / kind, kind, device) for kind in KINDS))
        model.save_pretrained(out / "model")
        options = {"seed": run.seed, "temperature": run.temperature}
        accuracy, samples = caption_accuracy(model, "val", run.captions, run.best_of, **options)
        new_pairs, new_samples = caption_accuracy(model, "new_pairs", run.captions, run.best_of, **options)
        _save_sheets(out, samples, new_samples)
    seconds["total"] = sum(seconds.values())
    evaluated = [line for line in read_log(out / "dvae" / "log.jsonl") if "val/codebook_used" in line]
    if not evaluated:
        raise ValueError(f"{out / 'dvae' / 'log.jsonl'} has lost the evaluations; give another --out")
    last = evaluated[-1]
    parts = {"dvae": model.dvae, "transformer": model.transformer, "clip": model.scorer.model}
    report = {
        "caption_accuracy": accuracy,
        "caption_accuracy_new_pairs": new_pairs,
        "pair_accuracy": pair_accuracy([samples, new_samples]),
        "resumed": resumed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "codebook": {"used": int(last["val/codebook_used"]), "perplexity": round(last["val/perplexity"], 1)},
        "sizes": {kind: sum(p.numel() for p in part.parameters()) for kind, part in parts.items()},
        "captions": run.captions,
        "best_of": run.best_of,
        "temperature": run.temperature,
        "seed": run.seed,
        "model": model.hash,
        "peak_memory_gib": peak_memory(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    write_json(out / "report.json", report)
    write_card(out / "model", report)
    write_report(ReportArgs(out, seed=run.seed, device=run.device))
    _print(out, report)
    return report


def first_stages(configs: Path) -> tuple[TrainTokenizerArgs, TrainDVAEArgs, EncodeImagesArgs]:
    """Text tokenizer, dVAE and image tokens, as configured for the shapes."""
    transformer, dvae = (configs / family / "shapes.yaml" for family in ("transformer", "dvae"))
    return (
        load(TrainTokenizerArgs, [transformer], schema=TrainTransformerArgs),
        load(TrainDVAEArgs, [dvae]),
        load(EncodeImagesArgs, [dvae], schema=TrainDVAEArgs),
    )


def make_missing_stages() -> None:
    """Train text tokenizer and dVAE on shapes and encode images, unless runs/ has complete results."""
    commands = {"text": train_tokenizer, "dvae": train_dvae, "tokens": encode_images}
    for (stage, command), args in zip(commands.items(), first_stages(CONFIGS), strict=True):
        if not is_complete(stage):
            print(f"no {stage} under {ROOT}/ yet: training or encoding first")
            command(args)


def _prepare(out: Path) -> Path:
    """Create the directory; a finished quick start in it is moved aside, never deleted."""
    if (out / "report.html").exists():  # written last
        names = (out.with_name(f"{out.name}-{i}") for i in range(1, 10**6))
        old = next(name for name in names if not name.exists())
        out.rename(old)
        print(f"{out} held a finished quick start: moved to {old}")
    return make_directory(check_result(out))


@contextmanager
def _stage(name: str, seconds: dict[str, float]):
    """Print the stage and how long it took."""
    print(f"\n== {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    print(f"== {name} took {seconds[name]:.0f} s", flush=True)


def _save_sheets(out: Path, samples: ShapesSamples, new_samples: ShapesSamples) -> None:
    """samples.png, first and best of n under each caption, and the last reconstructions.

    The second half of samples.png are pairs of a color and a shape that training never showed together.
    """
    cells = []
    for title, some in (("", samples), ("never seen together: ", new_samples)):
        best_of, count = some.pixels.shape[1], min(8, len(some.captions))
        for caption, *pair in zip(
            some.captions[:count], to_pil(some.first()), to_pil(some.ranked()), strict=False
        ):
            text = f"{title}{caption} (left: first, right: best of {best_of})"
            cells.append((text, image_grid([pair], scale=2)))
    captioned_grid(cells, columns=min(4, count)).save(out / "samples.png")
    shutil.copyfile(max((out / "dvae").glob("reconstructions-*.png")), out / "reconstructions.png")
    plot_losses({kind: out / kind for kind in KINDS}).save(out / "losses.png")


def _print(out: Path, report: dict[str, Any]) -> None:
    if report["resumed"]:
        print("\nResumed: the seconds leave out what an earlier, interrupted run took.")
    seconds, memory = report["seconds"]["total"], report["peak_memory_gib"]
    print(f"\n{seconds:.0f} s, {memory} GiB. Share of images that show their caption:")
    print(f"  {'':16}{'held-out scenes':>16}{'new color-shape pairs':>25}")
    for name, share in report["caption_accuracy"].items():
        print(f"  {name:16}{share:16.3f}{report['caption_accuracy_new_pairs'][name]:25.3f}")
    prompt = "a red cross above a blue circle on a white background"
    print(f"Look at {out / 'samples.png'} and, in a browser, {out / 'report.html'}. Generate your own:")
    words = f'--model {out / "model"} --prompt "{prompt}" --temperature {report["temperature"]}'
    print(f"  python scripts/sample.py {words}")
