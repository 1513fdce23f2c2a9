"""Serve a web page that draws images for captions, ranks them and completes uploaded ones (paper sections
2.6, 3.3).

python scripts/app.py runs/quickstart/model                        http://127.0.0.1:7860, for this computer
alone python scripts/app.py runs/quickstart/model --host 0.0.0.0         for the whole network; it asks no
password

It needs gradio: pip install 'zeroshot-text2image[app]'.
"""

import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from dalle.app.config import Limits
from dalle.config import cli_errors, parse
from dalle.train.config import Precision

if TYPE_CHECKING:
    from dalle.pipelines.dalle import DALLE


@dataclass(frozen=True)
class AppArgs:
    """Serves a web page that draws images for captions."""

    model: Positional[Path | None] = None
    """Model directory, such as runs/quickstart/model."""
    host: str = "127.0.0.1"
    """Address to listen at; this computer alone unless given. 0.0.0.0 lets in the whole network, without a
    password."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    share: bool = False
    """Ask Gradio's server for a public address, through which anyone who knows it can draw."""
    limits: Limits = Limits()
    """The most that a visitor may ask for."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first there is."""
    precision: Precision = "auto"
    """Of the transformer's matrices: fp32, bf16 or fp16; auto takes bf16 where the device has it in
    hardware."""
    int8: bool = False
    """Keep the transformer's matrices in 8 bits, a quarter of the bytes of fp32, see `sample.py --help`."""


class OnlyOurFiles:
    """Refuses what would let Gradio fetch other servers' files for a visitor."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and ("://" in scope["path"] or "/proxy=" in scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"only files of this page are served"})
            return
        await self.app(scope, receive, send)


def app(run: AppArgs) -> None:
    """Serves until it is interrupted.

    Raises:
        ValueError: no model there, a port that cannot be had.
        ImportError: Gradio is not installed.
    """
    from dalle.app.ui import load_gradio
    from dalle.hub.hub import resolve_source
    from dalle.io.format import read_config
    from dalle.pipelines.dalle import DALLE
    from dalle.train.precision import resolve_device

    if run.model is None:
        raise ValueError("say which model: python scripts/app.py runs/quickstart/model")
    read_config(
        resolve_source(run.model, ["config.json"])
    )  # a mistake is told at once, with Gradio or without
    load_gradio()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Control-C does: the folder is removed
    model = DALLE.from_pretrained(run.model, resolve_device(run.device))
    with TemporaryDirectory(prefix="dalle-app-") as folder:
        page = launch(run, model, Path(folder))
        try:
            print(f"{page.local_url} draws with {run.model}; Control-C ends it", flush=True)
            page.block_thread()
        finally:
            page.close(verbose=False)


def launch(run: AppArgs, model: "DALLE", folder: Path):
    """Starts the server in a thread of its own and gives its `gradio.Blocks`; `close` ends it.

    Args:
        folder: for uploads and images; the caller removes it.
    """
    from dalle.app.ui import Page
    from dalle.train.precision import precision_label

    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # the only way to tell Gradio where
    facts = {"precision": precision_label(run.precision, run.int8, model.device)}
    page = Page(model.to_precision(run.precision, run.int8), run.limits, facts)
    blocks = page.build()
    try:
        blocks.launch(**_server(run), **page.look())
        if run.share and not blocks.share_url:
            blocks.close(verbose=False)
            raise ValueError("Gradio's server gave no public address; leave out --share, or try again later")
    except OSError:
        raise ValueError(
            f"cannot listen at {run.host}, port {run.port}; give another --host or --port"
        ) from None
    return blocks


def _server(run: AppArgs) -> dict[str, Any]:
    from starlette.middleware import Middleware  # comes with Gradio

    return {
        "server_name": run.host,
        "server_port": run.port or _free_port(run.host),
        "share": run.share,
        "prevent_thread_lock": True,
        "quiet": True,
        "show_error": False,
        "inbrowser": False,
        "footer_links": [],
        "run_history": False,
        "enable_monitoring": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "max_file_size": run.limits.upload,
        "app_kwargs": {"middleware": [Middleware(OnlyOurFiles)]},
    }


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def main() -> None:
    """Command line of app."""
    with cli_errors():
        app(parse(AppArgs, description=__doc__))
