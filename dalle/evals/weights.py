"""Weights of the networks that measure: a file of another program, read without running what is in it."""

import hashlib
from pathlib import Path

from torch import Tensor, nn

from dalle.pretrained.torch_file import read_torch_file, weights_of


def read_weights(path: Path, how: str, under: str = "") -> dict[str, Tensor]:
    """Tensors of a file by name; ValueError, with `how` to get it, where there is none.

    Args:
        under: read only those whose names begin so, and take that off.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}. {how}")
    saved = weights_of(read_torch_file(path).tree)
    return {name.removeprefix(under): one.clone() for name, one in saved.items() if name.startswith(under)}


def load_named(model: nn.Module, path: Path, how: str, under: str = "") -> None:
    """Fills a module from a file, strictly.

    Args:
        model: takes the weights.
        path: the file.
        how: told with an error: how to get the right file.
        under: what the names in the file begin with; others are left unread.

    Raises:
        ValueError: no such file; tensors that lack, are foreign, or of another shape.
    """
    tensors, own = read_weights(path, how, under), model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    wrong = [name for name in tensors if name not in own or own[name].shape != tensors[name].shape]
    if missing or wrong:
        told = "; ".join(
            f"{what} {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            for what, names in (("it lacks", missing), ("it should not have", wrong))
            if names
        )
        raise ValueError(f"{path} is not the file that is needed: {told}. {how}")
    model.load_state_dict(tensors, strict=False, assign=True)


def file_hash(path: Path) -> str:
    """sha256 of a file, 16 hex characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
