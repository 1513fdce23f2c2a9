"""Images for every caption of a file: shared by processes, resumed where it stopped, in constant memory.

OUT/run.json                       settings, model and captions by hash: a run goes on only if they are the same
OUT/000/000012-a-red-cross-00.png  the best image of caption 12, then -01.png, ..., and -grid.png
OUT/parts/000012.jsonl             records of the captions from 12 on, written when their images are whole
OUT/samples.jsonl                  all records in order, at the end; parts/ is gone then
OUT/sheet.png                      the best images of the first captions
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dalle.io.files import make_directory, read_json, write_json, write_text
from dalle.io.images import captioned_grid
from dalle.pipelines.best_of_n import auto_batch_size, captions_of_a_block
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation
from dalle.pipelines.prompts_file import check_captions, groups, words
from dalle.train.processes import Processes

PER_FOLDER = 1000  # captions
ON_SHEET = 24  # captions


@dataclass
class FileSampler:
    """Draws for a file of captions.

    Args:
        model: draws.
        prompts: the file.
        out: where everything is written.
        settings: what `DALLE.generate` takes besides the captions; n, best_of and seed among them.
        facts: what else the records shall hold still for a run to go on, such as the precision.
        processes: which share of the captions is ours.
    """

    model: DALLE
    prompts: Path
    out: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    processes: Processes

    def run(self) -> int:
        """Draws what is not drawn yet; gives how many captions there are.

        Raises:
            ValueError: a caption that cannot be drawn (nothing is written then), a directory of another run.
        """
        truncate = self.settings.get("truncate", False)
        count, captions = check_captions(
            self.prompts, lambda caption: self.model.text_tokens([caption], truncate)
        )
        settings = self._settled(captions)
        together = _together(settings)
        model_hash = self.model.hash
        if not (self.out / "samples.jsonl").exists():
            for i, (first, some) in enumerate(groups(self.prompts, together)):
                part = self.out / "parts" / f"{first:06d}.jsonl"
                if i % self.processes.count == self.processes.rank and not part.exists():
                    self._draw(first, some, settings, model_hash, together, part)
        self.processes.wait()
        if self.processes.rank == 0:
            self._join(together)
        self.processes.wait()
        return count

    def _settled(self, captions: str) -> dict[str, Any]:
        """The settings of the run that lies in the directory, or ours, written there."""
        path, settings = self.out / "run.json", dict(self.settings)
        found = read_json(path) if path.exists() else None
        if found is None and self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no run of captions; give another --out")
        if settings.get("batch") is None:
            guided = settings.get("guidance") not in (None, 1)
            fitting = auto_batch_size(self.model.transformer, 2 if guided else 1)
            settings["batch"] = (
                found["settings"].get("batch") if found else min(self.processes.gather(fitting))
            )
        _together(settings)  # before anything is written
        ours = {"settings": settings, "model": self.model.hash, "captions": captions, **self.facts}
        if found is None:
            self.processes.wait()  # all have looked before one writes
            if self.processes.rank == 0:
                make_directory(self.out / "parts")
                write_json(path, ours)
            self.processes.wait()
        elif found != json.loads(json.dumps(ours)):
            differ = [key for key in ours if found.get(key) != json.loads(json.dumps(ours[key]))]
            raise ValueError(f"{self.out} holds a run with other {', '.join(differ)}; give another --out")
        return settings

    def _draw(
        self, first: int, captions: list[str], settings: dict, model_hash: str, together: int, part: Path
    ):
        filled = captions + captions[-1:] * (together - len(captions))  # a block has one shape
        drawn = self.model.generate(filled, progress=False, **settings)
        if len(drawn) < len(filled) or any(one.partial for one in drawn):
            raise KeyboardInterrupt
        folder = make_directory(self.out / f"{first // PER_FOLDER:03d}")
        lines = []
        for number, generation in enumerate(drawn[: len(captions)], start=first):
            name = f"{number:06d}-{words(generation.prompt)}"
            records = write_images(self.model, generation, folder, f"{name}-", model_hash)
            lines += [{"caption": number, **one, "file": f"{folder.name}/{one['file']}"} for one in records]
        write_text(part, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(f"{part.stem}: {drawn[0].prompt!r}" + f" and {len(captions) - 1} more" * (len(captions) > 1))

    def _join(self, together: int) -> None:
        """parts/*.jsonl -> samples.jsonl, in order of the captions."""
        if not (self.out / "samples.jsonl").exists():
            partial = self.out / ".partial-samples.jsonl"
            with partial.open("w", encoding="utf-8") as joined:
                for first, _ in groups(self.prompts, together):
                    joined.write((self.out / "parts" / f"{first:06d}.jsonl").read_text(encoding="utf-8"))
            os.replace(partial, self.out / "samples.jsonl")
            save(sheet_of_bests(self.out), self.out / "sheet.png")
        shutil.rmtree(self.out / "parts", ignore_errors=True)


def _together(settings: dict[str, Any]) -> int:
    return captions_of_a_block(settings["best_of"], settings["batch"], settings.get("together"))


def sheet_of_bests(out: Path) -> Image.Image:
    """The best image of each of the first captions, its caption below it."""
    bests: dict[int, tuple[str, Image.Image]] = {}
    with (out / "samples.jsonl").open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if len(bests) == ON_SHEET and record["caption"] not in bests:
                break
            if record["caption"] not in bests:
                bests[record["caption"]] = record["prompt"], Image.open(out / record["file"])
    cells = list(bests.values())
    return captioned_grid(cells, columns=6, scale=max(1, 128 // cells[0][1].width))


def write_images(
    model: DALLE, generation: Generation, folder: Path, stem: str, model_hash: str
) -> list[dict]:
    """One PNG an image, best first, and a sheet of all; gives a record of each."""
    likelihoods = model.log_likelihood(generation.prompt, generation.image_tokens, truncate=True)
    records = []
    for i, image in enumerate(generation.images):
        save(image, folder / f"{stem}{i:02d}.png")
        records.append(
            {
                "file": f"{stem}{i:02d}.png",
                "prompt": generation.prompt,
                "seed": generation.seed,
                "candidate": generation.candidates[i],
                "score": generation.scores[i] if generation.scores else None,
                "log_likelihood": {"text": float(likelihoods.text[i]), "image": float(likelihoods.image[i])},
                "model": model_hash,
            }
        )
    save(generation.grid(), folder / f"{stem}grid.png")
    return records


def save(image: Image.Image, path: Path) -> None:
    """A PNG that is whole if it is there."""
    partial = path.with_name(f".partial-{path.name}")
    image.save(partial, format="PNG")
    os.replace(partial, path)
