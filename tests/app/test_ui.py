"""Web page: its events and server, over HTTP and in a browser."""

import base64
import json
import shutil
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from dalle.commands.app import AppArgs, launch
from dalle.commands.sample import SampleArgs, sample
from dalle.pipelines import best_of_n
from dalle.sampling import SamplingConfig

httpx = pytest.importorskip("httpx", reason="comes with gradio")
pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")
PROJECT = Path(__file__).parents[2]
LOCAL = {"trust_env": False, "timeout": 60}


@pytest.fixture
def image(tmp_path) -> Path:
    image = Image.new("RGB", (60, 40), "green")
    image.paste("red", (0, 0, 60, 20))
    image.save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def upload(server, content: bytes, status: int = 200):
    files = {"files": ("cat.png", BytesIO(content), "image/png")}
    reply = httpx.post(f"{server.url}gradio_api/upload", files=files, **LOCAL)
    assert reply.status_code == status
    return as_file(reply.json()[0]) if status == 200 else None


def as_file(path: str) -> dict:
    return {"path": path, "url": path, "orig_name": "cat.png", "meta": {"_type": "gradio.FileData"}}


def call(server, name: str, values: list) -> list[dict]:
    """The messages of an event of the page, called as a browser calls it."""
    number = next(i for i, one in server.blocks.fns.items() if one.name == name)
    request = {"data": values, "fn_index": number, "session_hash": f"s{time.monotonic_ns()}"}
    assert httpx.post(f"{server.url}gradio_api/queue/join", json=request, **LOCAL).status_code == 200
    messages, session = [], {"session_hash": request["session_hash"]}
    with httpx.stream("GET", f"{server.url}gradio_api/queue/data", params=session, **LOCAL) as events:
        for line in events.iter_lines():
            if line.startswith("data:"):
                messages.append(json.loads(line.removeprefix("data:")))
                if messages[-1]["msg"] == "process_completed":
                    break
    return messages


def generate(server, prompt: str, **changes) -> list[dict]:
    options = {"caption": prompt, "seed": 3, "n": 2, "best_of": 5, "temperature": 1, "top_k": 0, "top_p": 1}
    options |= {"guidance": 1, "image": None, "rows": 2} | changes
    return call(server, "generate", list(options.values()))


def results(messages: list[dict]) -> tuple[str, list[str], dict[str, bytes]]:
    """Summary, labels of the images, and files of the zip."""
    data = messages[-1]["output"]["data"]
    with zipfile.ZipFile(data[4]["value"]["path"]) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return data[2], [one["caption"] for one in data[3]["value"]], files


def error(messages: list[dict]) -> str | None:
    assert not messages[-1]["success"]
    return messages[-1]["output"]["error"]


class TestGenerate:
    def test_options_give_the_files_of_sample_py(self, server, model, chain, prompt, tmp_path):
        sampling = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "guidance": 2.0}
        summary, labels, ours = results(generate(server, prompt, **sampling))
        args = SampleArgs(prompt, model=chain / "model", best_of=5, num_images=2, seed=3, device="cpu")
        args = replace(args, sampling=SamplingConfig(**sampling), precision="fp32", out=tmp_path / "out")
        sample(args)
        theirs = {file.name: file.read_bytes() for file in args.out.iterdir()}
        record, expected = (json.loads(files.pop("sample.json")) for files in (ours, theirs))
        assert ours == theirs
        assert ours.keys() == {"00.png", "01.png", "grid.png"}
        assert record == {key: expected[key] for key in record}
        assert (record["seed"], record["model"], record["precision"]) == (3, model.hash, "fp32")
        assert labels == [f"{i + 1}: score {one['score']:.3f}" for i, one in enumerate(record["images"])]
        assert summary.startswith("The best 2 of 5 images, seed 3")

    def test_an_upload_is_completed(self, server, model, prompt, image):
        messages = generate(server, prompt, image=upload(server, image.read_bytes()), rows=1)
        record = json.loads(results(messages)[2]["sample.json"])
        expected = model.complete(prompt, image, rows=1, n=2, best_of=5, seed=3, progress=False)
        assert [one["score"] for one in record["images"]] == pytest.approx(expected.scores)
        assert (record["image"], record["rows"]) == ("cat.png", 1)

    def test_a_random_seed_is_shown(self, server, prompt):
        one, other = (results(generate(server, prompt, seed=-1, best_of=2))[0] for _ in range(2))
        assert one.split(", ")[1] != other.split(", ")[1]

    def test_without_a_scorer_images_are_unranked(self, server, model, prompt, monkeypatch):
        monkeypatch.setattr(model, "scorer", None)
        summary, labels, _ = results(generate(server, prompt, best_of=64))
        assert summary.startswith("2 images, unranked")
        assert labels == ["candidate 0", "candidate 1"]

    def test_letters_without_a_token_are_a_warning(self, server):
        assert any(one["msg"] == "log" and "円" in one["log"] for one in generate(server, "円"))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"caption": " \n "}, "prompt is empty"),
            ({"caption": "a" * 1001}, "at most 1000"),
            ({"caption": "a red cross and " * 30}, "tokens"),
            ({"n": 0}, "less than minimum value 1"),
            ({"n": 17}, "greater than maximum value 16"),
            ({"best_of": 513}, "greater than maximum value 512"),
            ({"best_of": 1}, "best_of must be n to"),
            ({"temperature": -1}, "less than minimum value 0"),
            ({"seed": 1e300}, "greater than maximum"),
            ({"top_k": -1}, "top_k"),
            ({"top_p": 1.5}, "top_p"),
            ({"rows": 4}, "greater than maximum value 3"),
        ],
    )
    def test_wrong_options_are_refused_before_sampling(
        self, server, prompt, positions_sampled, changes, words
    ):
        assert words in error(generate(server, **{"prompt": prompt} | changes))
        assert positions_sampled == []


class TestServer:
    @pytest.mark.parametrize(
        "route", ["file=", "gradio_api/file=", "static/", "assets/", "gradio_api/proxy="]
    )
    @pytest.mark.parametrize(
        "path",
        ["/etc/passwd", "../../../../etc/passwd", "%2Fetc%2Fpasswd", __file__, "MODEL", "http://192.0.2.1/a"],
    )
    def test_it_serves_no_other_file_and_no_address(self, server, chain, route, path):
        path = path.replace("MODEL", f"{chain}/model/config.json")
        reply = httpx.get(server.url + route + path, **LOCAL)
        assert not reply.is_success
        assert server.outside == []

    def test_a_large_upload_is_refused(self, server):
        shutil.rmtree(server.folder)
        upload(server, bytes(200_001), status=413)
        assert not list(server.folder.rglob("cat.png"))

    def test_a_forged_path_is_not_read(self, server):
        assert error(call(server, "preview", [as_file("/etc/passwd"), 2])) is None
        message = error(call(server, "preview", [as_file("http://192.0.2.1/a.png"), 2]))
        assert "expected an uploaded image" in message
        assert server.outside == []

    def test_a_preview_of_an_upload(self, server, image):
        reply = call(server, "preview", [upload(server, image.read_bytes()), 1])[-1]["output"]["data"][0]
        shown = Image.open(BytesIO(base64.b64decode(reply.split('"')[3].split(",")[1])))
        assert shown.size == (32, 32)
        assert shown.getpixel((5, 3))[0] > 200
        assert max(abs(value - 128) for value in shown.getpixel((5, 25))) < 9

    def test_errors_are_escaped_and_internal_ones_show_no_details(self, server, image, monkeypatch):
        message = error(call(server, "preview", [upload(server, b"<b>no image</b>"), 2]))
        assert message.startswith("cat.png: wrong type")
        assert "<b>" not in message
        monkeypatch.setattr("dalle.app.ui.tiles", None)
        assert error(call(server, "preview", [upload(server, image.read_bytes()), 2])) is None

    def test_it_is_private_and_samples_one_request_at_a_time(self, server, model):
        blocks = server.blocks
        assert [one.concurrency_limit for one in blocks.fns.values() if one.name == "generate"] == [1]
        assert (blocks.analytics_enabled, blocks.share, blocks.server_name) == (False, False, "127.0.0.1")
        assert httpx.get(f"{server.url}gradio_api/info", **LOCAL).json()["named_endpoints"] == {}
        with pytest.raises(ValueError, match="cannot listen"):
            launch(AppArgs(port=blocks.server_port, device="cpu"), model, str(server.folder))


@pytest.fixture
def page(server, browser):
    """The page, opened; afterwards: it asked no other server, and no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, urls, failed = context.new_page(), [], []
    context.on("request", lambda request: urls.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(server.url)
    button(page, "Generate").wait_for()
    yield page
    context.close()
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith((server.url, "data:", "blob:"))] == []
    assert (failed, server.outside) == ([], [])


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def start(page, caption: str, n: int = 2, best_of: int = 5, seed: int = 3) -> None:
    page.get_by_label("Caption", exact=True).fill(caption)
    for name, value in (("Images", n), ("Best of", best_of)):
        page.get_by_label(f"number input for {name}", exact=True).fill(str(value))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    button(page, "Generate").click()


@pytest.fixture
def slow_steps(positions_sampled, monkeypatch):
    """Slows sampling down; gives a list that grows with each step."""
    generate_tokens = best_of_n.generate_tokens

    def slow(*args, **options):
        for tokens in generate_tokens(*args, **options):
            time.sleep(0.1)
            yield tokens

    monkeypatch.setattr(best_of_n, "generate_tokens", slow)
    return positions_sampled


class TestBrowser:
    def test_images_appear_row_by_row_then_ranked_with_a_download(self, page, model, prompt, slow_steps):
        start(page, prompt)
        page.get_by_text("Candidates 1 to 5 of 5: row").wait_for()
        page.locator("#live img").first.wait_for()
        assert page.locator("#live img").count() == 2
        assert len(slow_steps) < 16
        page.get_by_text("The best 2 of 5 images, seed 3").wait_for()
        expected = model.generate(prompt, n=2, best_of=5, seed=3, progress=False)
        labels = [f"{i}: score {score:.3f}" for i, score in enumerate(expected.scores, 1)]
        assert page.locator("#best .caption-label").all_inner_texts() == labels
        assert not page.locator("#live img").first.is_visible()
        with page.expect_download() as waiting:
            page.get_by_text("Download images and sample.json").click()
        assert "00.png" in zipfile.ZipFile(waiting.value.path()).namelist()

    def test_stop_keeps_the_best_so_far(self, page, prompt, slow_steps):
        start(page, prompt, best_of=500)
        page.get_by_text("Candidates 17 to 32 of 500").wait_for()
        button(page, "Stop").click()
        page.get_by_text("Stopped.").wait_for()
        page.get_by_text("The best 2 of 16 images").wait_for()
        page.wait_for_timeout(1000)
        steps = len(slow_steps)
        assert steps <= 16 * 3
        page.wait_for_timeout(500)
        assert len(slow_steps) == steps
        assert page.get_by_text("Stopped.").is_visible()

    @pytest.mark.slow
    def test_who_leaves_stops_and_who_waits_can_stop(self, page, prompt, slow_steps, server, browser):
        other = browser.new_page()
        other.goto(server.url)
        start(other, prompt, best_of=500)
        other.locator("#live img").first.wait_for()
        start(page, prompt, best_of=64)
        button(page, "Stop").click()
        page.get_by_text("Stopped.").wait_for()
        other.close()
        deadline, steps = time.monotonic() + 60, -1
        while steps != len(slow_steps):
            assert time.monotonic() < deadline
            steps = len(slow_steps)
            page.wait_for_timeout(2000)
        start(page, prompt)
        page.get_by_text("The best 2 of 5 images").wait_for()
