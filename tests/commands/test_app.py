"""The app command: what it refuses, and that it leaves nothing behind."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.commands.app import AppArgs, app

PROJECT = Path(__file__).parents[2]


def test_without_gradio_or_model_it_does_not_start(chain, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="which model"):
        app(AppArgs())
    with pytest.raises(ValueError, match="port must be"):
        AppArgs(port=99999999)
    with pytest.raises(ValueError, match="no model directory"):
        app(AppArgs(tmp_path, port=0))
    with pytest.raises(ValueError, match="cannot listen"):  # before the model is looked at
        app(AppArgs(tmp_path, host="999.0.0.1"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"zeroshot-text2image\[app\]"):
        app(AppArgs(chain / "model"))


@pytest.mark.slow
def test_the_script_serves_and_leaves_nothing_behind(chain, tmp_path):
    env = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, PROJECT / "scripts/app.py", chain / "model", "--port=0", "--device=cpu"]
    with subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout.readline().startswith("http://127.0.0.1:")
        assert list(tmp_path.glob("dalle-app-*"))
        served.terminate()
        assert served.wait(60) == 0
    assert list(tmp_path.iterdir()) == []
