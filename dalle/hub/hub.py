"""Models to and from the Hugging Face Hub; a local path never uses the network.

A source is a directory, or else an id "owner/name", which is downloaded into the cache of huggingface_hub,
whose environment variables apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from huggingface_hub import errors, utils

from dalle.hub.model_card import CARD, PLACEHOLDER, Report, read_card
from dalle.io.files import read_config

FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pkl", ".json", ".yaml", ".md", ".txt")
FILE_SUFFIXES += (".tar", ".gz", ".zip", ".model")
"""Of what is taken for a local file, though it has the form of an id."""


def resolve_source(
    source: Path | str, kinds: Sequence[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The directory of a source; of a Hub id, the snapshot in the cache, downloaded if need be.

    Args:
        source: a path, which is used if it exists, or an id of the Hub; a `Path` is no id.
        kinds: parts to download with config.json and the text tokenizer, where they exist.
        revision: branch, tag or commit of a repository, "main" unless given.
        token: to read a private repository; that of the login unless given.
    """
    path = Path(source)
    if os.path.exists(path):  # False also for a name that is too long
        if revision is not None:
            raise ValueError(f"{source} is a local path, which has no revision {revision!r}; omit revision")
        return path
    repo_id = str(source).replace(os.sep, "/")
    local = isinstance(source, Path) or not _is_id(repo_id) or repo_id[0] in ".~"
    if local or os.path.exists(path.parent) or path.suffix in FILE_SUFFIXES:  # a typo is not sent to the Hub
        make = "make a directory with save_pretrained, or python scripts/quickstart.py"
        raise ValueError(f"{source} is no model directory, nor an id of the Hub (owner/name); {make}")
    files = ["config.json", "text_tokenizer.json", *(f"{kind}.safetensors" for kind in kinds)]
    with _hub_errors(repo_id):
        options = {"revision": revision, "token": token, "allow_patterns": files}
        folder = Path(huggingface_hub.snapshot_download(repo_id, **options))
    if not (folder / "config.json").is_file():
        raise ValueError(f"{repo_id} on the Hub has no config.json: it holds no model of this library")
    return folder


def _is_id(name: str) -> bool:
    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def list_hub_files(directory: Path) -> dict[str, Path]:
    """Files of a model directory to upload, by name; ValueError for a missing file."""
    config = read_config(directory)
    names = ["config.json", *(f"{kind}.safetensors" for kind in config["parts"])]
    if "text" in config["inputs"]:
        names.append("text_tokenizer.json")
    for name in names:
        if not (directory / name).is_file():
            raise ValueError(f"no file {directory / name}; the model directory is incomplete")
    return {name: directory / name for name in names}


def check_login(repo_id: str, token: str | bool | None = None) -> None:
    """ValueError for something that is no id, or without a token to write."""
    if not _is_id(repo_id):
        raise ValueError(f"expected the id of a repository of the Hub, owner/name, got {repo_id!r}")
    if not isinstance(token, str) and (token is False or huggingface_hub.get_token() is None):
        login = "run `hf auth login`, set HF_TOKEN, or give token="
        raise ValueError(f"pushing to {repo_id} needs a token with the right to write: {login}")


def push_to_hub(
    model: Any,
    repo_id: str,
    report: Report | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload of a model directory",
) -> str:
    """Uploads a model in one commit and returns its URL; creates the repository if there is none.

    Args:
        model: a model directory, or an object with `save_pretrained`.
        repo_id: "owner/name".
        report, license: for a new model card (`dalle.hub.model_card.model_card`).
        private: visibility of a new repository; default: the owner's.
        revision: branch, created if there is none; default: "main".
        token: with the right to write; default: that of the login.
        message: of the commit.
    """
    check_login(repo_id, token)
    api = huggingface_hub.HfApi(token=token)
    with TemporaryDirectory() as folder:
        directory = model
        if not isinstance(model, Path):
            directory = Path(folder) / "model"
            model.save_pretrained(directory, report, license)
        card = read_card(directory, report, license).replace(PLACEHOLDER, repo_id)
        files = {CARD: card.encode(), **list_hub_files(directory)}
        operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()]
        with _hub_errors(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise ValueError("the repository exists and is public; make it private on its page")
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
            return commit.commit_url


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Errors of huggingface_hub as ValueError, on one line."""
    try:
        yield
    except (errors.HTTPError, OSError, ValueError) as error:
        raise ValueError(f"{repo_id} on the Hub: {' '.join(str(error).split())}") from None
