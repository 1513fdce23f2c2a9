"""Which family a configuration file is of: by its folder, else by the fields that it fills."""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_diffusion import TrainDiffusionArgs, train_diffusion
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import ConfigError, from_dict, read_yaml
from dalle.train.config import TrainArgs

TRAININGS: dict[str, tuple[type[TrainArgs], Callable[[Any], Path]]] = {
    "dvae": (TrainDVAEArgs, train_dvae),
    "transformer": (TrainTransformerArgs, train_transformer),
    "clip": (TrainCLIPArgs, train_clip),
    "diffusion": (TrainDiffusionArgs, train_diffusion),
}

EACH_KIND = f"--help after --kind {{{','.join(TRAININGS)}}}, or after --config FILE, explains every word."


def take_kind(words: Sequence[str]) -> tuple[str, list[str]]:
    """The family of a command line, by `--kind` or else the first --config; and the words without --kind."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--kind")
    parser.add_argument("--config", action="append", default=[])
    known, rest = parser.parse_known_args(words)
    if known.kind not in (None, *TRAININGS):
        raise ValueError(f"unknown kind {known.kind!r}; expected one of {', '.join(TRAININGS)}")
    if not (known.kind or known.config):
        raise ValueError(f"give --config configs/<family>/<name>.yaml, or --kind {{{','.join(TRAININGS)}}}")
    configs = [word for file in known.config for word in ("--config", file)]
    return known.kind or kind_of_file(Path(known.config[0])), configs + rest


def kind_of_file(path: Path) -> str:
    """The family of a configuration file; ValueError where its fields fit none, or several."""
    if path.parent.name in TRAININGS:
        return path.parent.name
    data, fitting = read_yaml(path), []
    for kind, (run_class, _) in TRAININGS.items():
        with suppress(ConfigError):
            from_dict(run_class, data)
            fitting.append(kind)
    if len(fitting) != 1:
        said = f"fits {' and '.join(fitting)}" if fitting else "fits no family"
        raise ValueError(f"{path} {said}; say --kind {{{','.join(TRAININGS)}}}")
    return fitting[0]
