"""The system's Chromium for tests of web pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def open_chromium() -> Iterator:
    """A playwright browser; skips the test where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("the browser tests need a Chromium on the path")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()
