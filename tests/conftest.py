"""Shared fixtures: every stage at a tiny size, and a model directory trained for two steps."""

import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import huggingface_hub
import pytest
import torch

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.commands.train_diffusion import TrainDiffusionArgs
from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import load
from dalle.hub.registry import load_model
from dalle.io.files import CHECKSUMS, file_hashes, read_json, write_checksums, write_json
from dalle.pipelines import best_of_n
from dalle.pipelines.dalle import DALLE
from tests.helpers.hub_server import running
from tests.helpers.pretended_cuda import REAL, PretendedCUDA

PROJECT = Path(__file__).parents[1]
PROMPT = "a red cross above a blue circle on a white background"


COMMON = """\
steps: 2
device: cpu
eval_samples: 4
train:
  batch_size: 4
  precision: fp32
  ema: {decay: 0.9, update_every: 2}
  log_every: 1
  eval_every: 2
  save_every: 2
"""
TINY = {  # 32 x 32 pixels, 4 x 4 tokens
    "dvae": """\
data: {path: shapes, resolution: 32}
model: {widths: [4, 8, 8, 8], blocks_per_group: 1, downsample_factor: 8, vocab_size: 16, codebook_dim: 8}
encode: {images: 24, batch_size: 8}
crop: null
""",
    "transformer": """\
data: {path: shapes, resolution: 32}
text: {vocab_size: 400}
model:
  {depth: 2, heads: 2, head_dim: 8, text_len: 20, grid: [4, 4], conv_kernel: 3,
   text_vocab: 400, image_vocab: 16}
""",
    "clip": """\
data: {path: shapes, resolution: 36}
model:
  {embed_width: 8, head_dim: 8, image_size: 32, patch_size: 16, vision_width: 16, vision_layers: 1,
   text_len: 20, text_vocab: 400, text_width: 16, text_layers: 1}
""",
    "diffusion": """\
data: {path: shapes, resolution: 16}
low_resolution: 8
model:
  {image_size: 16, width: 32, channel_mult: [1, 2], blocks: 1, attention: [8], head_width: 16, dropout: 0.1,
   text_len: 20, text_vocab: 400, text_width: 16, text_layers: 1, text_heads: 2, diffusion: {steps: 50}}
eval_steps: 2
""",
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing by threads."""
    torch.set_num_threads(1)


@pytest.fixture(params=["pretended", REAL])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A CUDA device: one that CPU tensors pass for, and a real one where there is one, without TF32."""
    if request.param == "pretended":
        monkeypatch.setattr("dalle.transformer.generate.CUDAGraphStep", lambda step: step)
        with PretendedCUDA():
            yield torch.device("cuda", 0)
        return
    for switches in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(switches, "allow_tf32", False)
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()  # an error of a kernel belongs to this test


@pytest.fixture(scope="session")
def tiny_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory like configs/, each family's shapes.yaml at the tiny size."""
    folder = tmp_path_factory.mktemp("configs")
    for family, text in TINY.items():
        (folder / family).mkdir()
        (folder / family / "shapes.yaml").write_text(text + COMMON)
    return folder


@pytest.fixture(scope="session")
def tiny_runs(tiny_configs: Path) -> SimpleNamespace:
    """The run of each stage at the tiny size: .text .dvae .encode .transformer .clip .diffusion"""
    files = {family: tiny_configs / family / "shapes.yaml" for family in TINY}
    return SimpleNamespace(
        text=load(TrainTokenizerArgs, [files["transformer"]], schema=TrainTransformerArgs),
        dvae=load(TrainDVAEArgs, [files["dvae"]]),
        encode=load(EncodeImagesArgs, [files["dvae"]], schema=TrainDVAEArgs),
        transformer=load(TrainTransformerArgs, [files["transformer"]]),
        clip=load(TrainCLIPArgs, [files["clip"]]),
        diffusion=load(TrainDiffusionArgs, [files["diffusion"]]),
    )


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_runs: SimpleNamespace) -> Path:
    """Every stage for two steps: text/ dvae/ tokens/ transformer/ clip/ model/. Read-only: copy it."""
    out = tmp_path_factory.mktemp("chain")
    train_tokenizer(replace(tiny_runs.text, out=out / "text", captions=2000))
    train_dvae(replace(tiny_runs.dvae, out=out / "dvae"))
    encode_images(replace(tiny_runs.encode, out=out / "tokens", dvae=out / "dvae"))
    train_transformer(inputs(tiny_runs.transformer, out, out=out / "transformer"))
    train_clip(inputs(tiny_runs.clip, out, out=out / "clip"))
    parts = (load_model(out / kind, kind) for kind in ("dvae", "transformer", "clip"))
    DALLE.from_parts(*parts).save_pretrained(out / "model")
    return out


def inputs(run, chain: Path, **changes):
    """A run that reads the earlier stages of `chain`, and other changes."""
    paths = {"text_tokenizer": chain / "text"} if hasattr(run, "text_tokenizer") else {}
    paths |= {"tokens": chain / "tokens"} if hasattr(run, "tokens") else {}
    return replace(run, **paths, **changes)


@pytest.fixture(scope="session")
def with_inputs() -> Callable:
    """`inputs`, for tests."""
    return inputs


@pytest.fixture
def dalle(chain: Path) -> DALLE:
    """A model of its own for each test."""
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture(scope="session")
def prompt() -> str:
    """A caption that the tiny model reads."""
    return PROMPT


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess]:
    """python(words, cwd): a fresh interpreter with one thread; scripts are named as scripts/NAME.py."""

    def run(words: list[str | Path], cwd: Path, seconds: float = 180) -> subprocess.CompletedProcess:
        words = [PROJECT / word if str(word).startswith("scripts/") else word for word in words]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "COLUMNS": "120"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)

    return run


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """script(name, *words): scripts/NAME.py in this process; gives .code .out .err as a shell would.

    It runs in an empty directory or `cwd`, which stays the current one. An unexpected error is raised.
    """

    def run(name: str, *words: str | Path, cwd: Path = tmp_path) -> SimpleNamespace:
        out, err, code, message = StringIO(), StringIO(), 0, ""
        monkeypatch.chdir(cwd)
        argv = patch.object(sys, "argv", [f"scripts/{name}.py", *map(str, words)])
        with argv, redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_path(str(PROJECT / "scripts" / f"{name}.py"), run_name="__main__")
            except SystemExit as stop:
                code, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code or 0, "")
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue() + message)

    return run


@pytest.fixture
def typed(script: Callable) -> Callable[[str, Path], str]:
    """typed("python scripts/NAME.py ...", cwd): the output of a command, which must succeed."""

    def run(command: str, cwd: Path) -> str:
        path, *words = shlex.split(command)[1:]
        done = script(Path(path).stem, *words, cwd=cwd)
        assert done.code == 0, f"{command}\n{done.out}\n{done.err}"
        return done.out

    return run


@pytest.fixture
def positions_sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each batch sampled so far, one entry after each."""
    plain, positions = best_of_n.generate_tokens, []

    def counted(*args, **options):
        for tokens in plain(*args, **options):
            positions.append(tokens.shape[2])
            yield tokens

    monkeypatch.setattr(best_of_n, "generate_tokens", counted)
    return positions


@pytest.fixture(scope="session")
def change_meta() -> Callable[..., None]:
    """change_meta(checkpoint, key=value): edits its meta.json and the checksums."""

    def change(checkpoint: Path, **changes: object) -> None:
        write_json(checkpoint / "meta.json", read_json(checkpoint / "meta.json") | changes)
        (checkpoint / CHECKSUMS).unlink()
        files = [path for path in checkpoint.iterdir() if path.is_file()]
        write_checksums(checkpoint, file_hashes(checkpoint, files))

    return change


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium as a browser of playwright; skips the test where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("the browser tests need a Chromium on the path")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A local Hub for huggingface_hub; nobody is logged in, the cache is empty."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    constants = huggingface_hub.constants
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the network fails."""

    refuse = Mock(side_effect=AssertionError("the network was used"))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
