"""Fixtures of the web page: the tiny model and its server."""

import socket
from types import SimpleNamespace

import pytest

from dalle.commands.app import AppArgs, launch
from dalle.pipelines.dalle import DALLE


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The page of the tiny model: .url .blocks .folder, and .outside, other addresses that it connects to."""
    folder, outside = tmp_path_factory.mktemp("served"), []
    connect = socket.socket.connect

    def watched(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no network in tests")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setenv("GRADIO_TEMP_DIR", "set by launch")
        args = AppArgs(port=0, device="cpu", precision="fp32", max_upload=200_000)
        blocks = launch(args, model, str(folder))
        yield SimpleNamespace(url=blocks.local_url, blocks=blocks, folder=folder, outside=outside)
        blocks.close(verbose=False)
