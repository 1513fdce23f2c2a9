"""The web page (dalle/app/ui.py): what its server gives away, and the page in a browser.

python tests/app/test_ui.py runs/quickstart/model docs/app.png      an image of the page after a drawing
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from PIL import Image

from dalle.app.config import Limits
from dalle.commands.app import AppArgs, launch
from dalle.pipelines import best_of_n
from dalle.pipelines.dalle import DALLE

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")
PROJECT = Path(__file__).parents[2]
CAPTION = "a green triangle to the right of a red circle on a white background"


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (60, 40), "green").save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


@pytest.fixture(scope="module")
def server(chain, tmp_path_factory):
    """The page of the tiny model: .url .blocks .folder, and .outside, the addresses that the server asked."""
    pytest.importorskip("gradio")
    folder, outside = tmp_path_factory.mktemp("served"), []
    plain = socket.socket.connect

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            outside.append(address)
            raise OSError("no outside in tests")
        return plain(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setenv("GRADIO_TEMP_DIR", "set by launch")
        run = AppArgs(port=0, device="cpu", precision="fp32", limits=Limits(upload=200_000))
        blocks = launch(run, DALLE.from_pretrained(chain / "model"), folder)
        yield SimpleNamespace(url=blocks.local_url, blocks=blocks, folder=folder, outside=outside)
        blocks.close(verbose=False)


def ask(server, path: str, **options):
    import httpx

    return httpx.get(server.url + path, trust_env=False, timeout=60, **options)


class TestServer:
    @pytest.mark.parametrize(
        "path",
        [
            "/etc/passwd",
            str(PROJECT / "README.md"),
            "README.md",
            "../../../../etc/passwd",
            "%2Fetc%2Fpasswd",
            __file__,
        ],
    )
    @pytest.mark.parametrize("route", ["file=", "gradio_api/file=", "gradio_api/file/", "static/", "assets/"])
    def test_no_file_of_the_computer_is_served(self, server, route, path):
        reply = ask(server, route + path)
        assert reply.status_code in (403, 404)
        assert b"root:" not in reply.content

    def test_the_models_own_files_are_not_served(self, server, chain):
        assert ask(server, f"gradio_api/file={chain}/model/config.json").status_code == 403

    @pytest.mark.parametrize("route", ["file=", "gradio_api/file=", "gradio_api/proxy=", "proxy="])
    @pytest.mark.parametrize(
        "address", ["http://192.0.2.1/a.png", "https://x.hf.space/a", "HTTP://192.0.2.1/a"]
    )
    def test_nothing_is_fetched_from_other_servers(self, server, route, address):
        reply = ask(server, route + address)
        assert (reply.status_code, reply.content) == (403, b"only files of this page are served")
        assert server.outside == []

    def test_an_upload_that_is_too_large_is_refused(self, server):
        import httpx

        files = {"files": ("big.png", BytesIO(bytes(200_001)), "image/png")}
        reply = httpx.post(f"{server.url}gradio_api/upload", files=files, trust_env=False, timeout=60)
        assert reply.status_code == 413
        assert not list(server.folder.rglob("big.png"))

    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("/etc/passwd", None),
            ("http://192.0.2.1/a.png", "an image is uploaded, not fetched from an address"),
            ("https://example.com/a.png", "an image is uploaded, not fetched from an address"),
        ],
    )
    def test_a_image_that_was_not_uploaded_is_not_taken(self, server, path, said):
        """By a request that the page itself never sends."""
        reply = call(server, "preview", [as_file(path), 2])
        assert (reply["success"], reply["output"]["error"]) == (False, said)
        assert server.outside == []

    def test_an_uploaded_image_is_taken(self, server, image):
        path = upload(server, "cat.png", image.read_bytes())
        assert Path(path).is_relative_to(server.folder)
        assert "data:image/png;base64," in call(server, "preview", [as_file(path), 2])["output"]["data"][0]

    def test_what_is_no_image_is_told_in_a_sentence(self, server):
        reply = call(server, "preview", [as_file(upload(server, "cat.png", b"<b>no image</b>")), 2])
        assert reply["output"]["error"].startswith("cat.png: wrong type")
        assert "<b>" not in reply["output"]["error"]

    def test_a_bug_is_told_without_its_words(self, server, image, monkeypatch):
        def broken(*_):
            raise RuntimeError("/a/path/of/the/server")

        monkeypatch.setattr("dalle.app.ui.kept_part", broken)
        reply = call(server, "preview", [as_file(upload(server, "cat.png", image.read_bytes())), 2])
        assert reply["output"]["error"] == "this failed (RuntimeError); the server's log says more"

    def test_a_port_that_is_taken_is_told(self, server, model, tmp_path):
        port = server.blocks.server_port
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1, port {port}; give another"):
            launch(AppArgs(port=port, device="cpu"), model, tmp_path)

    def test_the_queue_draws_one_at_a_time(self, server):
        draws = [one for one in server.blocks.fns.values() if one.name == "loop"]
        assert [one.concurrency_limit for one in draws] == [1]
        assert server.blocks.analytics_enabled is False
        assert (server.blocks.share, server.blocks.server_name) == (False, "127.0.0.1")

    def test_no_function_is_open_to_programs(self, server):
        assert ask(server, "gradio_api/info").json()["named_endpoints"] == {}


def upload(server, name: str, content: bytes) -> str:
    import httpx

    files = {"files": (name, BytesIO(content), "image/png")}
    return httpx.post(f"{server.url}gradio_api/upload", files=files, trust_env=False, timeout=60).json()[0]


def as_file(path: str) -> dict:
    return {"path": path, "url": path, "orig_name": "cat.png", "meta": {"_type": "gradio.FileData"}}


def call(server, name: str, values: list) -> dict:
    """What a queued function of the page says, called as a browser calls it."""
    import httpx

    number = next(i for i, one in server.blocks.fns.items() if one.name == name)
    asked = {"data": values, "fn_index": number, "session_hash": f"s{time.monotonic_ns()}"}
    reply = httpx.post(f"{server.url}gradio_api/queue/join", json=asked, trust_env=False, timeout=60)
    assert reply.status_code == 200, reply.text
    with httpx.stream(
        "GET",
        f"{server.url}gradio_api/queue/data",
        params={"session_hash": asked["session_hash"]},
        trust_env=False,
        timeout=60,
    ) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                said = json.loads(line.removeprefix("data:"))
                if said["msg"] == "process_completed":
                    return said
    raise AssertionError("the queue ended")


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    if (program := chromium()) is None:
        pytest.skip("the browser tests need a Chromium on the path")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page, opened; at the end nothing was asked of any other server, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked, failed = [], []
    context.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(server.url)
    page.get_by_role("button", name="Draw", exact=True).wait_for()
    yield page
    context.close()
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert failed == []
    assert server.outside == []


def drawing_beside(browser, server, prompt: str, best_of: int):
    """Another visitor's page, whose first rows are there."""
    other = browser.new_page()
    other.goto(server.url)
    other.get_by_role("button", name="Draw", exact=True).wait_for()
    fill(other, prompt, best_of=best_of)
    draw(other)
    other.locator("#live img").first.wait_for()
    return other


def fill(page, caption: str, n: int = 2, best_of: int = 5, seed: str = "3") -> None:
    for name, value in (
        ("Caption", caption),
        ("Images", str(n)),
        ("Best of", str(best_of)),
        ("Seed", seed),
    ):
        page.get_by_label(name, exact=True).fill(value)


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def idle(page) -> None:
    """Waits until it can draw again."""
    page.locator("button:enabled", has_text="Draw").wait_for()


@pytest.fixture
def slow_rows(monkeypatch):
    """Tokens that take a while; gives the list of those drawn."""
    plain, slots = best_of_n.generate_tokens, []

    def slowly(*args, **options):
        for tokens in plain(*args, **options):
            slots.append(tokens.shape[2])
            time.sleep(0.1)
            yield tokens

    monkeypatch.setattr(best_of_n, "generate_tokens", slowly)
    return slots


class TestBrowser:
    def test_images_appear_row_by_row_then_ranked_with_scores_and_a_download(
        self, page, model, prompt, slow_rows, server
    ):
        fill(page, prompt)
        draw(page)
        page.locator("#live img").first.wait_for()
        assert page.locator("#live img").count() == 2
        assert page.get_by_text("Drawing candidates 1 to 5 of 5: row").is_visible()
        assert len(slow_rows) < 16
        idle(page)
        whole = model.generate(prompt, n=2, best_of=5, seed=3, progress=False)
        expected = [f"{i + 1}: score {score:.3f}" for i, score in enumerate(whole.scores)]
        assert page.locator("#best .caption-label").all_inner_texts() == expected
        assert page.get_by_text("2 images, the best of 5. Seed 3,").is_visible()
        assert not page.locator("#live img").is_visible()
        with page.expect_download() as waiting:
            page.get_by_text("Download images and sample.json").click()
        with zipfile.ZipFile(waiting.value.path()) as archive:
            told = json.loads(archive.read("sample.json"))
            assert Image.open(archive.open("00.png")).tobytes() == whole.images[0].tobytes()
        assert (told["prompt"], told["seed"], told["model"]) == (prompt, 3, model.hash)
        assert [one["score"] for one in told["images"]] == pytest.approx(whole.scores)

    def test_stop_ends_the_drawing_and_shows_the_best_so_far(self, page, prompt, slow_rows):
        fill(page, prompt, best_of=500)
        draw(page)
        page.get_by_text("Drawing candidates 17 to 32 of 500").wait_for()
        assert page.get_by_label("Caption", exact=True).is_disabled()
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped after").wait_for()
        idle(page)
        drawn = len(slow_rows)
        assert drawn <= 16 * 3
        assert page.locator("#best .caption-label").count() == 2
        time.sleep(0.5)
        assert len(slow_rows) == drawn

    def test_a_mistake_is_a_message(self, page):
        draw(page)
        page.get_by_text("the prompt is empty; say what the image shall show").wait_for()
        assert "Traceback" not in page.content()
        idle(page)

    @pytest.mark.slow
    def test_a_message_shows_what_was_typed_as_text(self, page, prompt):
        fill(page, prompt, seed="<img src=x onerror=window.bad=1>")
        draw(page)
        page.get_by_text("seed must be a whole number, or blank").wait_for()
        assert page.evaluate("window.bad") is None

    @pytest.mark.slow
    def test_an_uploaded_image_is_completed(self, page, model, prompt, image):
        page.get_by_text("Complete an image").click()
        page.locator("#image input[type=file]").set_input_files(image)
        page.locator("#kept img").wait_for()
        fill(page, prompt)
        draw(page)
        page.locator("#best img").first.wait_for()
        idle(page)
        whole = model.complete(prompt, image, rows=2, n=2, best_of=5, seed=3, progress=False)
        assert page.locator("#best .caption-label").first.inner_text() == f"1: score {whole.scores[0]:.3f}"

    @pytest.mark.slow
    def test_a_file_that_is_no_image_is_a_message(self, page, tmp_path):
        (tmp_path / "cat.png").write_bytes(b"no image")
        page.get_by_text("Complete an image").click()
        page.locator("#image input[type=file]").set_input_files(tmp_path / "cat.png")
        page.get_by_text("cat.png: wrong type").wait_for()

    @pytest.mark.slow
    def test_who_leaves_draws_no_further(self, page, prompt, slow_rows, server, browser):
        other = drawing_beside(browser, server, prompt, best_of=500)
        other.close()
        deadline = time.monotonic() + 60
        drawn = -1
        while drawn != len(slow_rows):
            assert time.monotonic() < deadline
            drawn = len(slow_rows)
            time.sleep(2)
        fill(page, prompt)
        draw(page)
        page.get_by_text("2 images, the best of 5").wait_for()

    @pytest.mark.slow
    def test_who_waits_for_another_can_stop_too(self, page, prompt, slow_rows, server, browser):
        other = drawing_beside(browser, server, prompt, best_of=48)
        fill(page, prompt, best_of=500)
        draw(page)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped before it began.").wait_for()
        other.get_by_text("2 images, the best of 48").wait_for()
        other.close()


@pytest.mark.slow
def test_the_script_serves_and_leaves_nothing_behind(chain, tmp_path):
    """Ended as a service manager ends it."""
    pytest.importorskip("gradio")
    env = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        PROJECT / "scripts" / "app.py",
        chain / "model",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as served:
        said = served.stdout.readline()
        assert said.startswith("http://127.0.0.1:")
        assert list(tmp_path.glob("dalle-app-*"))
        served.terminate()
        assert served.wait(60) == 0
    assert list(tmp_path.iterdir()) == []


def shoot(directory: Path, image: Path) -> None:
    """The page after a drawing, with a model of a directory."""
    from playwright.sync_api import sync_playwright

    with TemporaryDirectory() as folder, sync_playwright() as play:
        blocks = launch(AppArgs(port=0), DALLE.from_pretrained(directory), Path(folder))
        browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 520})
        page.goto(blocks.local_url)
        page.get_by_text("Sampling").click()
        page.get_by_label("number input for Temperature").fill("0.6")
        page.get_by_text("Sampling").click()
        fill(page, CAPTION, n=8, best_of=32, seed="1")
        draw(page)
        page.get_by_text("8 images, the best of 32").wait_for(timeout=600_000)
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        page.screenshot(path=image)
        browser.close()
        blocks.close(verbose=False)


if __name__ == "__main__":
    shoot(*map(Path, sys.argv[1:]))
