"""Serve a web page that samples images for captions, ranks them and completes uploaded ones.

python scripts/app.py runs/quickstart/model                   http://127.0.0.1:7860, for this computer alone
python scripts/app.py runs/quickstart/model --host 0.0.0.0    for the whole network, without a password

It needs gradio: pip install 'zeroshot-text2image[app]'.
"""

import importlib.util
import os
import signal
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from dalle.config import check_positive, cli_errors, configuration, parse
from dalle.train.config import Precision

if TYPE_CHECKING:
    from dalle.pipelines.pipeline import Pipeline


@configuration
class AppArgs:
    """Serves a web page that samples images for captions."""

    model: Positional[Path | None] = None
    """Model directory, such as runs/quickstart/model, of a DALL-E or a GLIDE."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 admits the whole network, without a password."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    allowed_hosts: tuple[str, ...] = ()
    """Other names of this computer that browsers may use, such as a proxy's."""
    share: bool = False
    """Ask Gradio's server for a public address; anyone who knows it can sample."""
    max_caption: int = 1000
    """Characters of a caption at most."""
    max_images: int = 16
    """Images to keep at most."""
    max_candidates: int = 512
    """Candidates at most; 512 in the paper."""
    max_upload: int = 10 * 2**20
    """Bytes of an uploaded image at most."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first available."""
    precision: Precision = "auto"
    """Format of the transformer's matrices; auto is bf16 where the hardware supports it."""
    int8: bool = False
    """Store the transformer's matrices in 8 bits, see `sample.py --help`."""

    def __post_init__(self):
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be 0 to {2**16 - 1}, got {self.port}")
        if not self.host.strip():
            raise ValueError("host must be an address, such as 127.0.0.1, or 0.0.0.0 for all")
        for name in self.allowed_hosts:
            if not name.strip() or "/" in name or name.count(":") == 1:
                raise ValueError(f"allowed_hosts are names without scheme and port, got {name!r:.100}")
        check_positive(self, "max_caption", "max_images", "max_candidates", "max_upload")


def app(args: AppArgs) -> None:
    """Serves until it is interrupted; ValueError without a model or a port, ImportError without Gradio."""
    from dalle.pipelines.open import open_pipeline
    from dalle.train.precision import resolve_device

    if args.model is None:
        raise ValueError("say which model: python scripts/app.py runs/quickstart/model")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the web page needs gradio: pip install 'zeroshot-text2image[app]'")
    host = args.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, args.port), family=family).close()
    except OSError as error:
        problem = f"cannot listen at {args.host}:{args.port} ({error.strerror})"
        raise ValueError(f"{problem}; give another --host or --port") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes the folder, as Ctrl-C does
    device = resolve_device(args.device)
    model = open_pipeline(str(args.model), device, args.precision, int8=args.int8)
    with TemporaryDirectory(prefix="dalle-app-") as folder:
        page = launch(args, model, folder)
        try:
            print(f"{page.share_url or page.local_url} samples from {args.model}; Ctrl-C ends it", flush=True)
            page.block_thread()
        finally:
            page.close(verbose=False)


def launch(args: AppArgs, model: "Pipeline", folder: str) -> Any:
    """Starts the server in a thread and returns its `gradio.Blocks`; files are kept in the folder."""
    os.environ["GRADIO_TEMP_DIR"] = folder
    from starlette.middleware import Middleware

    from dalle.app.glide import GLIDEPage
    from dalle.app.guard import Guard
    from dalle.app.ui import CSS, THEME, Page
    from dalle.pipelines.glide import GLIDE

    kind = GLIDEPage if isinstance(model, GLIDE) else Page
    page = kind(model.to_precision(args.precision, args.int8), args).build()
    host = args.host.strip("[]")
    try:
        page.launch(
            app_kwargs={"middleware": [Middleware(Guard, args)]},
            server_name=f"[{host}]" if ":" in host else host,
            server_port=args.port or None,
            share=args.share,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size=args.max_upload,
            theme=THEME,
            css=CSS,
        )
    except OSError:
        raise ValueError(f"cannot listen at {args.host}:{args.port}; give another --host or --port") from None
    return page


def main() -> None:
    """Command line of app."""
    with cli_errors():
        app(parse(AppArgs, description=__doc__))
