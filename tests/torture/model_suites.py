"""Readers of models and settings: checkpoints, tokenizers, files of other programs, YAML, command lines."""

import json
import shutil
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from torch import nn

from dalle.commands.sample import SampleArgs
from dalle.commands.train_clip import TrainCLIPArgs
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import CONFIGS, load, parse
from dalle.hub.registry import load_model
from dalle.io.files import CHECKSUMS, write_checksums
from dalle.pipelines.dalle import DALLE
from dalle.pretrained.inspect import describe_checkpoint
from dalle.pretrained.load import load_image_tokenizer, load_transformer
from dalle.pretrained.openai_clip import load_scorer
from dalle.text import load_text_tokenizer
from dalle.train.checkpoint import latest_checkpoint
from tests.helpers import dalle_pytorch_reference, mindalle_reference, rudalle_reference, vqgan_reference
from tests.helpers.external import OPENAI_CLIP, open_clip_weights
from tests.helpers.line import checkpoint_names, file_contents, fit_line, log_lines, newest_files
from tests.helpers.text_tokenizers import HUGGING_FACE, train_hugging_face, train_youtokentome
from tests.torture.harness import READ, Suite
from tests.torture.mutations import damage

STEPS = 4


def make_runs(whole: Path, chain: Path) -> None:
    """A run of three checkpoints, and next to it the same after its last step."""
    fit_line(whole / "run", steps=STEPS - 1, keep_last=3)
    shutil.copytree(whole / "run", whole.parent / "finished")
    fit_line(whole.parent / "finished", steps=STEPS, keep_last=3)


def damage_newest(run: Path, rng: Random) -> str:
    """Damages the newest checkpoint, the pointer, or the log."""
    checkpoints = run / "checkpoints"
    newest = checkpoints / checkpoint_names(run)[-1]
    place = rng.choice((newest, newest, newest, checkpoints / "latest", run / "log.jsonl"))
    if rng.random() < 0.1:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        return f"{place.name} removed"
    return damage(place, rng)


def read_run(damaged: Path, whole: Path) -> str:
    """A whole checkpoint is taken, and the run ends as one that was not damaged."""
    found, finished = latest_checkpoint(damaged, None), whole.parents[1] / "finished"
    assert file_contents(found) == file_contents(whole / "checkpoints" / found.name)
    fit_line(damaged, steps=STEPS, keep_last=3)
    assert newest_files(damaged) == newest_files(finished)
    assert log_lines(damaged)[-1] == log_lines(finished)[-1]  # earlier lines may be lost
    return READ


def make_models(whole: Path, chain: Path) -> None:
    for name in ("dvae", "transformer", "clip", "model"):
        shutil.copytree(chain / name, whole / name)
    for log in whole.rglob("log.jsonl"):
        log.unlink()


def damage_model(folder: Path, rng: Random) -> str:
    """Often with sound checksums, as someone hostile writes them."""
    how = damage(folder, rng)
    for sums in folder.rglob(CHECKSUMS):
        if rng.random() < 0.7 and sums.is_file() and CHECKSUMS not in how:
            write_checksums(sums.parent)
            how += ", with its checksum"
    return how


def read_model(damaged: Path, whole: Path) -> str:
    errors = []
    for read in (describe_checkpoint, DALLE.from_pretrained if damaged.name == "model" else _load_kind):
        try:
            read(damaged)
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[-1]
    return READ


def _load_kind(path: Path) -> None:
    load_model(path, path.name)


def make_tokenizers(whole: Path, chain: Path) -> None:
    shutil.copy(chain / "text" / "text_tokenizer.json", whole)
    for name in HUGGING_FACE:
        (whole / f"{name.replace(' ', '-')}.json").write_text(json.dumps(train_hugging_face(name)[1]))
    (whole.parent / "corpus").mkdir()
    shutil.copy(train_youtokentome(whole.parent / "corpus"), whole / "bpe.model")


def read_tokenizer(damaged: Path, whole: Path) -> str:
    tokenizer = load_text_tokenizer(damaged)
    ids = tokenizer.encode("a red circle, größe \u2028 红色")
    assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)
    return READ


def make_published(whole: Path, chain: Path) -> None:
    """Small files in exactly the layouts of other programs."""
    torch.manual_seed(0)
    weights = dalle_pytorch_reference.make_file(dalle_pytorch_reference.make_weights(depth=1), depth=1)
    torch.save(weights, whole / "dalle.pt")
    torch.save(weights, whole / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(rudalle_reference.make_weights("v3", depth=1), whole / "rudalle.pt")
    vqgan = vqgan_reference.make_state()
    torch.save({"state_dict": vqgan}, whole / "vqgan.pt")
    save_file({name: t.contiguous() for name, t in vqgan.items()}, whole / "vqgan.safetensors")
    torch.save(open_clip_weights() | OPENAI_CLIP, whole / "clip.pt")
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))), whole / "script.pt")
    mindalle_reference.write_folder(whole / "mindalle")


LOADERS = {"dalle": load_transformer, "legacy": load_transformer, "vqgan": load_image_tokenizer}
LOADERS |= {"mindalle": load_transformer, "clip": load_scorer}  # of ruDALL-E known sizes alone are loaded


def read_published(damaged: Path, whole: Path) -> str:
    described = describe_checkpoint(damaged)
    if damaged.stem in LOADERS:
        LOADERS[damaged.stem](damaged)
        assert described.get("fits", True) or damaged.is_dir()
    return READ


ARGS = {"dvae": TrainDVAEArgs, "transformer": TrainTransformerArgs, "clip": TrainCLIPArgs}


def make_configs(whole: Path, chain: Path) -> None:
    for path in CONFIGS.glob("*/*.yaml"):
        shutil.copy(path, whole / f"{path.parent.name}-{path.name}")


def read_config(damaged: Path, whole: Path) -> str:
    load(ARGS[damaged.name.split("-")[0]], [damaged])
    return READ


COMMANDS = {
    "dvae": "--steps 9 --seed 1 --data.path x --data.filters.min-words 3 --train.batch-size 4 --device cpu "
    "--model.widths 4 8 8 8 --train.optimizer.lr.initial 1e-3 --train.precision fp32 --loss.beta.final 6.6",
    "transformer": "--steps 9 --model.depth 2 --model.grid 4 4 --model.conv-kernel 3 --train.ema.decay 0.9 "
    "--parallel none --train.save-every 10 --text-tokenizer runs/text",
    "clip": "--data.resolution 36 --model.vision-layers 1 --model.text-len 20 --train.keep-every 3000",
    "sample": "--prompt text --best-of 9 -n 3 --seed 4 --temperature 0.9 --top-k 5 --top-p 0.9 "
    "--batch-size 8 --precision bf16 --guidance 1.5 --keep-rows 2",
}


def make_words(whole: Path, chain: Path) -> None:
    for name, words in COMMANDS.items():
        (whole / f"{name}.txt").write_text("\n".join(words.split()))


def read_words(damaged: Path, whole: Path) -> str:
    """The command line, a word on each line; to compare long unknown options takes tyro a minute."""
    text = damaged.read_text(errors="surrogateescape")
    words = [line[:2000] for line in text.split("\n") if line]
    try:
        parse((ARGS | {"sample": SampleArgs})[damaged.stem], words)
    except SystemExit as stop:
        if stop.code == 2 or str(stop.code).startswith("error: "):
            raise ValueError(f"{damaged.name}: {stop.code}") from None
    return READ


SUITES = {
    "runs": Suite(make_runs, read_run, damage_newest),
    "models": Suite(make_models, read_model, damage_model),
    "text tokenizers": Suite(make_tokenizers, read_tokenizer),
    "published weights": Suite(make_published, read_published),
    "configurations": Suite(make_configs, read_config),
    "command lines": Suite(make_words, read_words),
}
