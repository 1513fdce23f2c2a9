"""Which family a configuration file is of: by its folder, else by the fields that it fills."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import ConfigError, from_dict, read_yaml
from dalle.runs.args import TrainArgs

TRAININGS: dict[str, tuple[type[TrainArgs], Callable[[Any], Path]]] = {
    "dvae": (TrainDVAEArgs, train_dvae),
    "transformer": (TrainTransformerArgs, train_transformer),
    "clip": (TrainCLIPArgs, train_clip),
}

EACH_KIND = f"--help after --kind {{{','.join(TRAININGS)}}}, or after --config FILE, explains every word."


def take_kind(words: Sequence[str]) -> tuple[str, list[str]]:
    """The family that command line words speak of, and the words without --kind.

    `--kind` says it; else the folder of the first --config does (configs/clip/paper.yaml); else its fields
    do.

    Raises:
        ValueError: an unknown kind, or none can be told.
    """
    joined = ("--kind=", "--config=")
    words = [part for word in words for part in (word.split("=", 1) if word.startswith(joined) else [word])]
    if "--kind" in words[:-1]:
        at = words.index("--kind")
        kind, words = words[at + 1], words[:at] + words[at + 2 :]
        if kind not in TRAININGS:
            raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(TRAININGS)}")
        return kind, words
    if "--config" not in words[:-1]:
        raise ValueError(f"give --config configs/<family>/<name>.yaml, or --kind {{{','.join(TRAININGS)}}}")
    return kind_of_file(Path(words[words.index("--config") + 1])), words


def kind_of_file(path: Path) -> str:
    """The family of a configuration file; ValueError where its fields fit none, or several."""
    if path.parent.name in TRAININGS:
        return path.parent.name
    data = read_yaml(path)
    fitting = [kind for kind, (run_class, _) in TRAININGS.items() if _fits(run_class, data)]
    if len(fitting) != 1:
        said = f"fits {' and '.join(fitting)}" if fitting else "fits no family"
        raise ValueError(f"{path} {said}; say --kind {{{','.join(TRAININGS)}}}")
    return fitting[0]


def _fits(run_class: type, data: dict[str, Any]) -> bool:
    try:
        from_dict(run_class, data)
    except ConfigError:
        return False
    return True
