"""The web page (dalle/stages/app*.py): its work without a page, its server, and the page in a browser."""

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
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dalle.drawing import Drawer
from dalle.pipeline import DALLE
from dalle.stages.app import AppRun, app, launch
from dalle.stages.app_work import (
    Limits,
    Request,
    Work,
    ended,
    kept_part,
    label,
    number,
    open_upload,
    standing,
    write_zip,
)
from dalle.stages.sample import SampleRun, sample

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")
LIMITS = Limits()
PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture
def picture(tmp_path) -> Path:
    """A file of 60 x 40 pixels, red above green."""
    image = Image.new("RGB", (60, 40), "green")
    image.paste("red", (0, 0, 60, 20))
    image.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def request(prompt: str, **changes) -> Request:
    return Request(**{"caption": prompt, "seed": 3, "n": 2, "best_of": 5} | changes)


class TestWork:
    def test_the_defaults_are_those_of_sample_py(self):
        plain, ours = SampleRun(), Request()
        assert (ours.n, ours.best_of) == (plain.keep, plain.best_of)
        assert ours.sampling == {name: getattr(plain, name) for name in ours.sampling}

    def test_it_draws_what_generate_draws(self, model, prompt):
        asked = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "guidance": 2.0}
        work = Work(model, request(prompt, **asked), LIMITS)
        steps = list(work.steps(Event()))
        whole = model.generate(prompt, n=2, best_of=5, seed=3, progress=False, **asked)
        assert torch.equal(work.generation.image_tokens, whole.image_tokens)
        assert work.generation.scores == whole.scores
        assert len(steps) == 4 + 1  # rows, and the block

    def test_it_completes_what_complete_completes(self, model, prompt, picture):
        work = Work(model, request(prompt, image=picture, rows=1), LIMITS)
        list(work.steps(Event()))
        whole = model.complete(prompt, picture, rows=1, n=2, best_of=5, seed=3, progress=False)
        assert torch.equal(work.generation.image_tokens, whole.image_tokens)

    def test_a_blank_seed_is_made_up_and_shown(self, model, prompt):
        seeds = {Work(model, request(prompt, seed=None), LIMITS).seed for _ in range(4)}
        assert len(seeds) == 4
        work = Work(model, request(prompt, seed=None, best_of=2), LIMITS)
        list(work.steps(Event()))
        assert f"Seed {work.seed}," in ended(work.generation, 1.0)

    def test_stopped_it_draws_no_further_row(self, model, prompt, monkeypatch):
        plain, slots = Drawer.tokens, []

        def counted(*args):
            for tokens in plain(*args):
                slots.append(tokens.shape[2])
                yield tokens

        monkeypatch.setattr(Drawer, "tokens", counted)
        work, stop = Work(model, request(prompt, best_of=40), LIMITS), Event()
        for i, _ in enumerate(work.steps(stop)):
            if i == 6:  # second row of the second block
                stop.set()
        assert len(slots) == 16 + 8
        assert (work.generation.drawn, work.generation.partial) == (16, True)
        assert ended(work.generation, 1.0).startswith("Stopped after 16 of 40 candidates. 2 pictures, the best of 16.")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"caption": ""}, "the prompt is empty"),
            ({"caption": " \n "}, "the prompt is empty"),
            ({"caption": "a" * 1001}, "the caption has 1,001 letters, at most 1,000 are read"),
            ({"caption": "a red cross and " * 30}, r"caption 0 has \d+ tokens, the layout has room for 19"),
            ({"n": 0}, "n must be at least 1"),
            ({"n": None}, "n is blank; give a number from 1 to 16"),
            ({"n": 17, "best_of": 20}, "n must be at most 16 here, got 17"),
            ({"best_of": 513}, "best_of must be at most 512 here, got 513"),
            ({"best_of": 1}, "best_of must be at least n, got best_of=1, n=2"),
            ({"temperature": -1}, "temperature must be 0"),
            ({"temperature": float("nan")}, "temperature must be 0"),
            ({"temperature": None}, "temperature is blank"),
            ({"top_k": 0}, "top_k must be at least 1"),
            ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
            ({"guidance": float("inf")}, "guidance must be a number"),
            ({"seed": -1}, "the seed must be 0 to"),
            ({"seed": 2**60}, "leave it blank for a new one"),
            ({"rows": 0}, "rows must be 1 to 3"),
            ({"rows": 4}, "rows must be 1 to 3"),
        ],
    )
    def test_what_cannot_be_drawn_is_told_before_anything_is_drawn(self, model, prompt, picture, changes, said):
        image = picture if "rows" in changes else None
        with pytest.raises(ValueError, match=said):
            Work(model, request(prompt, image=image, **changes), LIMITS)

    def test_letters_that_the_vocabulary_lacks_are_a_warning(self, model):
        assert ["lacks letters of '円'" in one for one in Work(model, request("円"), LIMITS).warnings] == [True]

    def test_without_a_scorer_what_is_asked_for_is_drawn_unranked(self, model, prompt):
        plain = DALLE(model.dvae, model.transformer, model.text)
        work = Work(plain, request(prompt, best_of=64), LIMITS)
        list(work.steps(Event()))
        assert (work.generation.drawn, work.warnings) == (2, [])
        assert label(work.generation, 1) == "candidate 1"
        assert "2 pictures, unranked" in ended(work.generation, 1.0)

    def test_how_far_it_is_and_the_scores_are_told(self, model, prompt):
        work = Work(model, request(prompt, best_of=20), LIMITS)
        told = [standing(step, 4, 4) for step in work.steps(Event())]
        assert told[1] == "Drawing candidates 1 to 16 of 20: row 2 of 4"
        assert told[-1] == "Drawing candidates 17 to 20 of 20: row 4 of 4"
        assert label(work.generation, 0) == f"1: score {work.generation.scores[0]:.3f}"

    @pytest.mark.parametrize(
        ("text", "kind", "value"), [("", int, None), (None, int, None), (" 7 ", int, 7), ("0.5", float, 0.5)]
    )
    def test_a_field_may_be_blank(self, text, kind, value):
        assert number("seed", text, kind) == value

    def test_a_field_that_is_no_number_is_told(self):
        with pytest.raises(ValueError, match=r"seed must be a whole number, or blank; got '1.5'"):
            number("seed", "1.5", int)


class TestUploads:
    def test_the_kept_part_is_shown(self, model, picture):
        shown = kept_part(open_upload(picture, LIMITS), 1, model)
        assert shown.size == (32, 32)
        assert {shown.getpixel((5, y)) for y in range(8)} == {(255, 0, 0)}
        assert {shown.getpixel((5, y)) for y in range(8, 32)} == {(128, 128, 128)}

    @pytest.mark.parametrize(
        ("content", "limits", "said"),
        [
            (b"no picture", LIMITS, "^cat.png: wrong type"),
            (b"", LIMITS, "^cat.png: truncated"),
            (b"\x89PNG\r\n\x1a\n broken", LIMITS, "^cat.png: "),
            (None, Limits(upload=50), "^cat.png has 0.0 MiB; expected at most 0"),
            (None, Limits(pixels=2399), "^cat.png has 60 x 40 pixels; expected at most 2,399 in all"),
        ],
    )
    def test_what_is_no_picture_or_too_large_is_told_without_the_servers_paths(self, picture, content, limits, said):
        if content is not None:
            picture.write_bytes(content)
        with pytest.raises(ValueError, match=said) as found:
            open_upload(picture, limits)
        assert str(picture.parent) not in str(found.value)


class TestZip:
    def test_it_holds_what_sample_py_writes(self, model, chain, prompt, tmp_path):
        work = Work(model, request(prompt), LIMITS)
        list(work.steps(Event()))
        path = write_zip(tmp_path, model, work.generation, work.options({"precision": "fp32"}))
        assert path.name == "a-red-cross-above-a-blue-circle-on-a-white-background-3.zip"
        assert list(tmp_path.iterdir()) == [path]
        run = SampleRun(prompt, model=chain / "model", best_of=5, keep=2, seed=3, device="cpu", precision="fp32",
                        out=tmp_path / "out")  # fmt: skip
        sample(run)
        with zipfile.ZipFile(path) as archive:
            ours = {name: archive.read(name) for name in archive.namelist()}
        theirs = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        assert ours.keys() == theirs.keys() == {"00.png", "01.png", "grid.png", "sample.json"}
        told, expected = (json.loads(files.pop("sample.json")) for files in (ours, theirs))
        assert ours == theirs
        assert {key: expected[key] for key in told} == told
        assert {"prompt", "seed", "n", "best_of", "temperature", "top_k", "top_p", "guidance", "batch", "precision",
                "model", "pictures"} == told.keys()  # fmt: skip
        assert told["model"] == model.hash

    def test_a_completion_names_its_picture_without_the_servers_folders(self, model, prompt, picture):
        work = Work(model, request(prompt, image=picture, rows=2), LIMITS)
        list(work.steps(Event()))
        assert work.options({})["image"] == "cat.png"
        assert work.options({})["rows"] == 2


class TestStart:
    def test_without_gradio_it_says_how_to_come_by_it(self, chain, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(ImportError, match=r"needs gradio: pip install 'zeroshot-text2image\[app\]'"):
            app(AppRun(chain / "model"))

    def test_without_a_model_it_says_so(self, tmp_path):
        pytest.importorskip("gradio")
        with pytest.raises(ValueError, match=r"say which model: python scripts/app\.py runs/quickstart/model"):
            app(AppRun())
        with pytest.raises(ValueError, match="is no model directory"):
            app(AppRun(tmp_path))

    def test_it_listens_to_this_computer_alone_and_shares_nothing_unless_asked(self):
        assert (AppRun().host, AppRun().share) == ("127.0.0.1", False)


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
        run = AppRun(port=0, device="cpu", precision="fp32", limits=Limits(upload=200_000))
        blocks = launch(run, DALLE.from_pretrained(chain / "model"), folder)
        yield SimpleNamespace(url=blocks.local_url, blocks=blocks, folder=folder, outside=outside)
        blocks.close(verbose=False)


def ask(server, path: str, **options):
    import httpx

    return httpx.get(server.url + path, trust_env=False, timeout=60, **options)


class TestServer:
    @pytest.mark.parametrize(
        "path",
        ["/etc/passwd", str(PROJECT / "README.md"), "README.md", "../../../../etc/passwd", "%2Fetc%2Fpasswd", __file__],
    )
    @pytest.mark.parametrize("route", ["file=", "gradio_api/file=", "gradio_api/file/", "static/", "assets/"])
    def test_no_file_of_the_computer_is_served(self, server, route, path):
        reply = ask(server, route + path)
        assert reply.status_code in (403, 404)
        assert b"root:" not in reply.content

    def test_the_models_own_files_are_not_served(self, server, chain):
        assert ask(server, f"gradio_api/file={chain}/model/config.json").status_code == 403

    @pytest.mark.parametrize("route", ["file=", "gradio_api/file=", "gradio_api/proxy=", "proxy="])
    @pytest.mark.parametrize("address", ["http://192.0.2.1/a.png", "https://x.hf.space/a", "HTTP://192.0.2.1/a"])
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
            ("http://192.0.2.1/a.png", "a picture is uploaded, not fetched from an address"),
            ("https://example.com/a.png", "a picture is uploaded, not fetched from an address"),
        ],
    )
    def test_a_picture_that_was_not_uploaded_is_not_taken(self, server, path, said):
        """By a request that the page itself never sends."""
        reply = call(server, "preview", [as_file(path), 2])
        assert (reply["success"], reply["output"]["error"]) == (False, said)
        assert server.outside == []

    def test_an_uploaded_picture_is_taken(self, server, picture):
        path = upload(server, "cat.png", picture.read_bytes())
        assert Path(path).is_relative_to(server.folder)
        assert "data:image/png;base64," in call(server, "preview", [as_file(path), 2])["output"]["data"][0]

    def test_what_is_no_picture_is_told_in_a_sentence(self, server):
        reply = call(server, "preview", [as_file(upload(server, "cat.png", b"<b>no picture</b>")), 2])
        assert reply["output"]["error"].startswith("cat.png: wrong type")
        assert "<b>" not in reply["output"]["error"]

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


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
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


def fill(page, caption: str, n: int = 2, best_of: int = 5, seed: str = "3") -> None:
    for name, value in (("Caption", caption), ("Pictures", str(n)), ("Best of", str(best_of)), ("Seed", seed)):
        page.get_by_label(name, exact=True).fill(value)


def draw(page) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def idle(page) -> None:
    """Waits until it can draw again."""
    page.locator("button:enabled", has_text="Draw").wait_for()


@pytest.fixture
def slow_rows(monkeypatch):
    """Tokens that take a while; gives the list of those drawn."""
    plain, slots = Drawer.tokens, []

    def slowly(*args):
        for tokens in plain(*args):
            slots.append(tokens.shape[2])
            time.sleep(0.1)
            yield tokens

    monkeypatch.setattr(Drawer, "tokens", slowly)
    return slots


class TestBrowser:
    def test_pictures_appear_row_by_row_then_ranked_with_scores_and_a_download(
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
        assert page.get_by_text("2 pictures, the best of 5. Seed 3,").is_visible()
        assert not page.locator("#live img").is_visible()
        with page.expect_download() as waiting:
            page.get_by_text("Download pictures and sample.json").click()
        with zipfile.ZipFile(waiting.value.path()) as archive:
            told = json.loads(archive.read("sample.json"))
            assert Image.open(archive.open("00.png")).tobytes() == whole.images[0].tobytes()
        assert (told["prompt"], told["seed"], told["model"]) == (prompt, 3, model.hash)
        assert [one["score"] for one in told["pictures"]] == pytest.approx(whole.scores)

    def test_stop_ends_the_drawing_and_shows_the_best_so_far(self, page, prompt, slow_rows):
        fill(page, prompt, best_of=500)
        draw(page)
        page.get_by_text("Drawing candidates 17 to 32 of 500").wait_for()
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
        page.get_by_text("the prompt is empty; say what the picture shall show").wait_for()
        assert "Traceback" not in page.content()
        idle(page)

    @pytest.mark.slow
    def test_a_message_shows_what_was_typed_as_text(self, page, prompt):
        fill(page, prompt, seed="<img src=x onerror=window.bad=1>")
        draw(page)
        page.get_by_text("seed must be a whole number, or blank").wait_for()
        assert page.evaluate("window.bad") is None

    @pytest.mark.slow
    def test_an_uploaded_picture_is_completed(self, page, model, prompt, picture):
        page.get_by_text("Complete a picture").click()
        page.locator("#picture input[type=file]").set_input_files(picture)
        page.locator("#kept img").wait_for()
        fill(page, prompt)
        draw(page)
        page.locator("#best img").first.wait_for()
        idle(page)
        whole = model.complete(prompt, picture, rows=2, n=2, best_of=5, seed=3, progress=False)
        assert page.locator("#best .caption-label").first.inner_text() == f"1: score {whole.scores[0]:.3f}"

    @pytest.mark.slow
    def test_a_file_that_is_no_picture_is_a_message(self, page, tmp_path):
        (tmp_path / "cat.png").write_bytes(b"no picture")
        page.get_by_text("Complete a picture").click()
        page.locator("#picture input[type=file]").set_input_files(tmp_path / "cat.png")
        page.get_by_text("cat.png: wrong type").wait_for()

    @pytest.mark.slow
    def test_who_leaves_draws_no_further(self, page, prompt, slow_rows, server, browser):
        other = browser.new_page()
        other.goto(server.url)
        other.get_by_role("button", name="Draw", exact=True).wait_for()
        fill(other, prompt, best_of=500)
        draw(other)
        other.locator("#live img").first.wait_for()
        other.close()
        deadline = time.monotonic() + 60
        drawn = -1
        while drawn != len(slow_rows):
            assert time.monotonic() < deadline
            drawn = len(slow_rows)
            time.sleep(2)
        fill(page, prompt)
        draw(page)
        page.get_by_text("2 pictures, the best of 5").wait_for()

    @pytest.mark.slow
    def test_who_waits_for_another_can_stop_too(self, page, prompt, slow_rows, server, browser):
        other = browser.new_page()
        other.goto(server.url)
        other.get_by_role("button", name="Draw", exact=True).wait_for()
        fill(other, prompt, best_of=48)
        draw(other)
        other.locator("#live img").first.wait_for()
        fill(page, prompt, best_of=500)
        draw(page)
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Stopped before it began.").wait_for()
        other.get_by_text("2 pictures, the best of 48").wait_for()
        other.close()


@pytest.mark.slow
def test_the_script_serves_and_leaves_nothing_behind(chain, tmp_path):
    """Ended as a service manager ends it."""
    pytest.importorskip("gradio")
    env = os.environ | {"PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, PROJECT / "scripts" / "app.py", chain / "model", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(words, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as served:
        said = served.stdout.readline()
        assert said.startswith("http://127.0.0.1:")
        assert list(tmp_path.glob("dalle-app-*"))
        served.terminate()
        assert served.wait(60) == 0
    assert list(tmp_path.iterdir()) == []
