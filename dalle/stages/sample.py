"""From a caption to ranked pictures on disk (paper section 2.6: best of 512 by CLIP)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle.files import make_directory, write_json
from dalle.pipeline import DALLE, Generation
from dalle.stages.runs import ROOT, newest, take_part, take_text
from dalle.train.precision import resolve_device


@dataclass(frozen=True)
class SampleRun:
    """Draws pictures for a caption, ranks them by CLIP and writes the best."""

    prompt: str = ""
    """The caption."""
    model: Path | None = None
    """Model directory; without it the parts below are joined."""
    tokenizer: Path | None = None
    """Text tokenizer, to be sure that it is the one the transformer was trained with."""
    dvae: Path | None = None
    """Run of the dVAE; the newest under runs/ unless given."""
    transformer: Path | None = None
    """Run of the transformer; the newest under runs/ unless given."""
    clip: Path | None = None
    """Run of the CLIP; the newest under runs/ unless given."""
    best_of: int = 64
    """Candidates to draw; the paper draws 512."""
    keep: int = 8
    """Pictures to write, best first."""
    seed: int = 0
    """With the caption and a candidate's number it fixes that picture."""
    temperature: float = 1.0
    """1 as the paper; 0 takes the most likely tokens."""
    top_k: int | None = None
    """Draw among the k most likely tokens only."""
    top_p: float | None = None
    """Draw among the likeliest tokens that reach this probability only."""
    guidance: float | None = None
    """Strength of classifier-free guidance; for a model trained with caption dropout."""
    image: Path | None = None
    """A picture whose top rows are kept; the model draws the rest."""
    rows: int | None = None
    """Rows of tokens to keep of --image; half of them unless given."""
    truncate: bool = False
    """Cut a caption that is too long instead of refusing it."""
    out: Path | None = None
    """Directory for the pictures; a new one under runs/samples unless given."""
    save_model: Path | None = None
    """Also write the joined parts as a model directory here, for from_pretrained and --model."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""


def sample(run: SampleRun) -> Path:
    """Writes 00.png, 01.png, ... (best first), grid.png and sample.json; never over another sample."""
    if not run.prompt.strip():
        raise ValueError('no caption; give --prompt "a red circle above a blue square on a white background"')
    if run.keep < 1 or run.best_of < run.keep:
        raise ValueError(f"best-of must be at least keep, and keep at least 1; got {run.best_of} and {run.keep}")
    if run.rows is not None and run.image is None:
        raise ValueError("--rows says how much of a picture to keep; give the picture with --image")
    parts = [name for name in ("dvae", "transformer", "clip", "tokenizer") if getattr(run, name)]
    if run.model and parts:
        raise ValueError(f"--model holds every part; leave out --{' --'.join(parts)}, or --model")
    out = _new_directory(run)
    try:
        model = open_model(run)
        if run.save_model:
            model.save_pretrained(run.save_model)
        _draw_into(out, model, run)
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    return out


def _draw_into(out: Path, model: DALLE, run: SampleRun) -> None:
    options = {
        "n": run.keep, "best_of": run.best_of, "seed": run.seed, "temperature": run.temperature,
        "top_k": run.top_k, "top_p": run.top_p, "guidance": run.guidance, "truncate": run.truncate,
    }  # fmt: skip
    if run.image:
        rows = model.transformer.layout.rows // 2 if run.rows is None else run.rows
        generation = model.complete(run.prompt, run.image, rows, **options)
        options |= {"image": str(run.image), "rows": rows}
    else:
        generation = model.generate(run.prompt, **options)
    options["best_of"] = drawn = run.best_of if generation.scores else len(generation.images)
    _write(out, generation, options, model.hash)
    print(f"{out}: {len(generation.images)} of {drawn} pictures for {run.prompt!r}")


def open_model(run: SampleRun) -> DALLE:
    """The model directory, or the parts joined; refuses parts that do not belong together."""
    device = resolve_device(run.device)
    if run.model:
        return DALLE.from_pretrained(run.model, device)
    dvae, transformer = (take_part(kind, getattr(run, kind), device) for kind in ("dvae", "transformer"))
    clip = take_part("clip", run.clip, device) if _ranks(run) else None
    return DALLE.from_parts(dvae, transformer, clip, take_text(run.tokenizer) if run.tokenizer else None)


def _ranks(run: SampleRun) -> bool:
    """Whether a CLIP takes part: where all candidates are kept it is not missed if there is none."""
    if run.clip is None and run.best_of == run.keep:
        try:
            newest("clip")
        except ValueError:
            print("note: there is no CLIP, so the pictures come unranked")
            return False
    return True


def _new_directory(run: SampleRun) -> Path:
    """An empty directory: --out, or runs/samples/<words of the caption>[-2, -3, ...]."""
    if run.out:
        if run.out.is_dir() and any(run.out.iterdir()):
            raise ValueError(f"{run.out} is not empty; give another --out")
        folder = run.out
    else:
        words = re.sub(r"[^a-z0-9]+", "-", run.prompt.lower()).strip("-")[:60] or "prompt"
        names = (words if i == 1 else f"{words}-{i}" for i in range(1, 10**6))
        folder = next(ROOT / "samples" / name for name in names if not (ROOT / "samples" / name).exists())
    return make_directory(folder)


def _write(out: Path, generation: Generation, options: dict[str, Any], model_hash: str) -> None:
    pictures = []
    for i, image in enumerate(generation.images):
        image.save(out / f"{i:02d}.png")
        score = generation.scores[i] if generation.scores else None
        pictures.append({"file": f"{i:02d}.png", "candidate": generation.candidates[i], "score": score})
    generation.grid().save(out / "grid.png")
    write_json(
        out / "sample.json",
        {"prompt": generation.prompt, **options, "model": model_hash, "pictures": pictures},
    )
