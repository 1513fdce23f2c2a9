"""Images for every prompt of a file: shared by processes, resumable.

OUT/run.json                       settings, model and prompts by hash: a run resumes only with the same
OUT/000/000012-a-red-cross-00.png  the best image of prompt 12, then -01.png, ..., and -grid.png
OUT/parts/000012.jsonl             records of the prompts from 12 on, written when their images are complete
OUT/samples.jsonl                  all records in order, at the end; parts/ is gone then
OUT/sheet.png                      the best images of the first prompts
"""

import hashlib
import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dalle.io.files import make_directory, read_json, write_json, write_text
from dalle.io.images import captioned_grid, load_image
from dalle.io.text import NOT_UTF8, is_caption, parse_json, read_text
from dalle.pipelines.best_of_n import num_prompts_per_batch
from dalle.pipelines.generation import save_png, slug, write_images
from dalle.pipelines.pipeline import Pipeline
from dalle.sampling import DiffusionSampling, SamplingConfig
from dalle.train.checkpoint_saver import lock_directory
from dalle.train.distributed import Distributed

PROMPTS_PER_FOLDER = 1000
PROMPTS_ON_SHEET = 24


def read_prompts(path: Path) -> list[str]:
    """One prompt per line, or the field "prompt" or "caption" of JSON lines; ValueError names a bad line."""
    text = read_text(path, "one prompt per line")
    if not text:
        raise ValueError(f"{path} holds no prompts")
    prompts = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        prompt, place = line, f"{path}, line {number}"
        if path.suffix in (".jsonl", ".ndjson"):
            record = parse_json(line, place)
            values = [record.get(key) for key in ("prompt", "caption")] if isinstance(record, dict) else []
            prompt = next((value for value in values if isinstance(value, str)), None)
            if prompt is None:
                raise ValueError(f'{place} has no "prompt" or "caption"')
            prompt = " ".join(prompt.split())
        if not is_caption(prompt):
            raise ValueError(f"{place} is empty, or a missing value such as nan; delete the line")
        if NOT_UTF8.search(prompt):
            raise ValueError(f"{place} holds bytes that are not UTF-8: {prompt!r:.80}")
        prompts.append(prompt.strip())
    return prompts


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of samples.jsonl or one of its parts; ValueError names a damaged line."""
    records = []
    for number, line in enumerate(read_text(path, "records of samples").removesuffix("\n").split("\n"), 1):
        place = f"{path}, line {number}"
        record = parse_json(line, place)
        words = [record.get(name) for name in ("file", "prompt")] if isinstance(record, dict) else [None]
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{place} is damaged; remove the file, and the same command makes it again")
        records.append(record)
    return records


def sample_prompts(
    model: Pipeline,
    path: Path,
    out: Path,
    n: int,
    best_of: int,
    seed: int,
    sampling: SamplingConfig | DiffusionSampling,
    truncate: bool,
    facts: dict[str, Any],
    processes: Distributed,
) -> int:
    """Generates the n best of `best_of` images for each prompt of a file, or what an earlier run left undone.

    Args:
        facts: what else must be the same for a run to resume: the precision, and `log_likelihood`, whether to
            record it.
        processes: those that share the prompts.

    Returns:
        The number of prompts.

    Raises:
        ValueError: a prompt that is too long (nothing is written then); a directory in use or of another run.
    """
    prompts = read_prompts(path)
    for number, prompt in enumerate(prompts, start=1):
        try:
            model.text_tokens([prompt], truncate)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    prompts_hash = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    earlier = read_json(out / "run.json") if (out / "run.json").exists() else None
    if not isinstance(settings := (earlier or {}).get("settings", {}), dict):
        raise ValueError(f"{out / 'run.json'} is damaged: its settings are no object; give another --out")
    files = (path for path in out.rglob("[!.]*") if path.is_file())  # a killed run may leave hidden ones
    if earlier is None and any(files):
        raise ValueError(f"{out} is not empty and holds no run of prompts; give another --out")
    if sampling.batch_size is None:
        fitting = min(processes.gather_objects(model.auto_batch_size(sampling, best_of)))
        sampling = replace(sampling, batch_size=settings.get("batch_size") if earlier else fitting)
    group_size = num_prompts_per_batch(best_of, sampling.batch_size, sampling.prompts_per_batch)
    settings = {"n": n, "best_of": best_of, "seed": seed, "truncate": truncate, **asdict(sampling)}
    run = {"settings": settings, "model": model.hash, "prompts": prompts_hash, **facts}
    if earlier not in (None, run):
        differ = [key for key in run if earlier.get(key) != run[key]]
        raise ValueError(f"{out} holds a run with other {', '.join(differ)}; give another --out")
    firsts = range(0, len(prompts), group_size)
    processes.barrier()  # all have read before one writes
    with ExitStack() as lock:
        processes.on_main(lambda: _begin(out, run, lock))
        if not (out / "samples.jsonl").exists():
            for first in firsts[processes.rank :: processes.world_size]:
                part = out / "parts" / f"{first:06d}.jsonl"
                if not part.exists():
                    _sample_group(model, first, prompts[first : first + group_size], group_size, run, part)
        processes.barrier()
        processes.on_main(lambda: _join(out, firsts))
    return len(prompts)


def _begin(out: Path, run: dict[str, Any], lock: ExitStack) -> None:
    """Locks the run until `lock` is closed, and writes its run.json."""
    lock.enter_context(lock_directory(out / "parts"))
    if not (out / "run.json").exists():
        write_json(out / "run.json", run)


def _sample_group(
    model: Pipeline, first: int, prompts: list[str], group_size: int, run: dict[str, Any], part: Path
) -> None:
    """Writes the images and records of some prompts, padded to a group so that all batches have one shape."""
    count = len(prompts)
    prompts = prompts + prompts[-1:] * (group_size - count)
    generations = model.generate(prompts, progress=False, **run["settings"])
    if len(generations) < group_size or any(one.interrupted for one in generations):
        raise KeyboardInterrupt
    folder = make_directory(part.parents[1] / f"{first // PROMPTS_PER_FOLDER:03d}")
    lines = []
    for index, generation in enumerate(generations[:count], start=first):
        stem = f"{index:06d}-{slug(generation.prompt)}-"
        for record in write_images(generation, folder, model, stem, run["log_likelihood"]):
            record |= {"index": index, "model": run["model"], "file": f"{folder.name}/{record['file']}"}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(part, "".join(lines))
    print(f"{part.stem}: {prompts[0]!r}" + (f" and {count - 1} more" if count > 1 else ""))


def _join(out: Path, firsts: range) -> None:
    """parts/*.jsonl -> samples.jsonl in order of the prompts, and sheet.png."""
    samples = out / "samples.jsonl"
    if not samples.exists():
        parts = [read_records(out / "parts" / f"{first:06d}.jsonl") for first in firsts]
        records = [json.dumps(record, ensure_ascii=False) + "\n" for part in parts for record in part]
        write_text(samples, "".join(records))
    if not (out / "sheet.png").exists():
        records = read_records(samples)
        best = [record for record in records if record["file"].endswith("-00.png")][:PROMPTS_ON_SHEET]
        if not best or not all((out / record["file"]).is_file() for record in best):
            raise ValueError(f"{samples} names images that are gone; remove it and sample again")
        cells = [(record["prompt"], load_image(out / record["file"])) for record in best]
        sheet = captioned_grid(cells, columns=6, scale=max(1, 128 // cells[0][1].width))
        save_png(sheet, out / "sheet.png")
    shutil.rmtree(out / "parts", ignore_errors=True)
