"""Models to and from the Hugging Face Hub. What lies here is read here: a local path never asks the network.

A source is a folder, or else an id "owner/name". Only an id is downloaded, into the cache of huggingface_hub,
whose
switches hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub
from huggingface_hub import errors, utils

from dalle.hub.model_card import CARD, Report, addressed, read_card
from dalle.io.format import read_config

LOGIN = "log in with `hf auth login`, set HF_TOKEN, or give token="


class HubMixin(ABC):
    """What can be saved as a model directory can be pushed as one."""

    @abstractmethod
    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory."""

    def push_to_hub(
        self,
        repo_id: str,
        report: Report | None = None,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        message: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes; the repository is made if there is none.

        Args:
            repo_id: "owner/name".
            report, license: for the card, as `save_pretrained`.
            private: of a repository made now; the owner's default unless given.
            revision: branch, "main" unless given; made if there is none.
            token: with the right to write; the one you logged in with unless given.
            message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: no login, no right to write, the Hub cannot be reached or refuses the card.
        """
        check_login(repo_id, token)
        with TemporaryDirectory() as folder:
            directory = Path(folder) / "model"
            self.save_pretrained(directory, report, license)
            return push_to_hub(directory, repo_id, read_card(directory), private, revision, token, message)


def resolve_source(
    source: Path | str, files: list[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The folder that a source names; of an id, the snapshot in the cache, downloaded if need be.

    Args:
        source: a path, which is taken if it exists, or an id of the Hub.
        files: names of what is needed, where it is there; no other file is downloaded.
        revision: branch, tag or commit of a repository, "main" unless given.
        token: to read a private repository; the one you logged in with unless given.

    Raises:
        ValueError: neither a path nor an id; or of an id: unknown, private, gated, no such revision, or not
            in the cache and not to be reached.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"{source} is a path here, which has no revision {revision!r}; leave out revision"
            )
        return path
    repo_id = str(source).replace(os.sep, "/")
    if not _is_id(repo_id):
        raise ValueError(
            f"{source} is no model directory: there is no such folder, and it is no id of the Hub (owner/name) either; "
            "make one with save_pretrained, or python scripts/quickstart.py"
        )
    if Path(owner := repo_id.partition("/")[0]).is_dir():
        raise ValueError(
            f"{source} is no model directory: there is no such folder in {owner}, which is a folder here; "
            "if you mean the repository of the Hub, go to another directory"
        )
    with _told(repo_id, revision):
        folder = Path(
            huggingface_hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=files)
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{repo_id} on the Hub has no config.json: it holds no model directory of this library"
        )
    return folder


def _is_id(name: str) -> bool:
    """Whether it may be "owner/name"."""
    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def list_hub_files(directory: Path) -> dict[str, Path]:
    """What of a model directory is pushed beside the card, by name: config, text tokenizer, weights; nothing
    else.

    Raises:
        ValueError: no model directory, or a file that it names is missing.
    """
    config = read_config(directory)
    names = ["config.json", *(["text_tokenizer.json"] if "text" in config["links"] else [])]
    found = {name: directory / name for name in names + [f"{kind}.safetensors" for kind in config["parts"]]}
    for path in found.values():
        if not path.is_file():
            raise ValueError(f"no file {path}; the model directory is incomplete")
    return found


def check_login(repo_id: str, token: str | bool | None = None) -> None:
    """ValueError for something that is no id, or where no token is known, before any work."""
    if not _is_id(repo_id):
        raise ValueError(f"expected the id of a repository of the Hub, owner/name, got {repo_id!r}")
    if not isinstance(token, str) and (token is False or huggingface_hub.get_token() is None):
        raise ValueError(
            f"to push to {repo_id} you need an account of the Hub and a token that may write: {LOGIN}"
        )


def push_to_hub(
    directory: Path,
    repo_id: str,
    card: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
) -> str:
    """Uploads a model directory with this card, in one commit; see `HubMixin.push_to_hub`."""
    check_login(repo_id, token)
    contents: dict[str, Path | bytes] = {CARD: addressed(card, repo_id).encode(), **list_hub_files(directory)}
    operations = [huggingface_hub.CommitOperationAdd(name, content) for name, content in contents.items()]
    api = huggingface_hub.HfApi(token=token)
    with _told(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(
                "the repository is there already and is public; make it private on its page of the Hub"
            )
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        message = message or "Upload of a model directory"
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


@contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """What huggingface_hub raises, as one sentence."""
    try:
        yield
    except errors.GatedRepoError:
        said = (
            f"{repo_id} is open only to those whom its owner lets in: ask on its page of the Hub, then "
            f"{LOGIN}"
        )
    except errors.RepositoryNotFoundError:
        said = (
            f"there is no folder {repo_id} here, and the Hub has no such repository, or it is private and your token "
            f"may not see it: check the name, or {LOGIN}"
        )
    except errors.RevisionNotFoundError:
        said = f"{repo_id} has no revision {revision!r}; look at its branches and tags on the Hub"
    except errors.LocalTokenNotFoundError:
        said = f"token=True asks for the token of a login, and there is none: {LOGIN}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        said = (
            f"there is no folder {repo_id} here, it is not whole in the cache of the Hub, and the Hub cannot be "
            "reached (no network, or HF_HUB_OFFLINE is set): check the path, or connect once"
        )
    except errors.HfHubHTTPError as error:
        said = _refused(repo_id, error)
    except ValueError as error:  # of the card, or of what is already there
        said = f"{repo_id}: {' '.join(str(error).split())}"
    except (errors.HTTPError, OSError) as error:
        said = f"{repo_id}: the Hub cannot be reached, or broke off ({error}); try again"
    else:
        return
    raise ValueError(said) from None


def _refused(repo_id: str, error: errors.HfHubHTTPError) -> str:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return f"the Hub does not let your token do this to {repo_id}; give one that may ({LOGIN})"
    why = getattr(error, "server_message", None) or str(error).splitlines()[0]
    return f"the Hub answers {status} for {repo_id} ({why})"
