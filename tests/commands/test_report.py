"""scripts/report.py: one self-contained page about any run folder, safe with any caption."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dalle.commands.report import ReportArgs, write_report
from dalle.hub.registry import LoadedModel
from dalle.io.files import read_json
from dalle.report.sections import SECTIONS

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>\'"&\ud800'
NAMES = [title.split()[0].lower() for title, *_ in SECTIONS]


class Page(HTMLParser):
    """Tags, text and sections of a page; every element must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert self.open == []
        self.sections = [attributes["id"] for tag, attributes in self.tags if tag == "section"]
        self.charts = [one["alt"] for _, one in self.tags if one.get("class") == "chart"]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(re.match(r"data:image/(webp|svg\+xml);base64,", source) for source in sources)
        return [decode(source) for source in sources if "svg" not in source[:20]]


def decode(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def report_of(folder: Path, **options) -> Page:
    return Page(write_report(ReportArgs(folder, device="cpu", **options)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(chain: Path, tmp_path_factory) -> Path:
    """A folder as the quick start leaves it, with an evaluation and a sample under a hostile caption."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(chain, folder)
    evaluation = {
        "temperature": 0.5,
        "provenance": {"hashes": {"dvae": HOSTILE[:20]}},
        "rerank": {"captions": 2, "score": {"1": 0.1, "2": 0.2}, "accuracy": {"1": 0.5, "2": None}},
        "images": {"blur": {"0": {"fid": 9.0}, "2": {"fid": 4.0}}},
        "dvae": {"psnr": None},
        "pair_accuracy": {"red": {"circle": 0.5}},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "samples" / "one").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "samples" / "one" / "00.png")
    record = {"prompt": HOSTILE, "best_of": 4, "temperature": 1.0, "seed": 0}
    record["images"] = [{"file": "../one/00.png", "score": 0.25}]
    (folder / "samples" / "one" / "sample.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def report(run: Path, prompt: str) -> Path:
    prompts = (prompt, "<script>red</script> & <b>circle</b>")
    with pytest.warns(UserWarning, match="vocabulary lacks"):
        return write_report(ReportArgs(run, prompts=prompts, best_of=4, device="cpu"))


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


class TestWholeFolder:
    def test_every_section_with_its_link_images_and_charts(self, page):
        assert page.sections == NAMES
        assert [one["href"] for tag, one in page.tags if tag == "a"] == [f"#{name}" for name in NAMES]
        assert len(page.images()) >= 14
        assert min(min(image.size) for image in page.images()) >= 16
        expected = {"loss", "image_loss", "text_loss", "perplexity", "image_to_text_acc", "lr", "fid"}
        expected |= {f"{name} of the best (evaluation.json)" for name in ("score", "accuracy")}
        assert expected <= set(page.charts)
        assert page.charts.count("loss") == 3

    def test_settings_that_differ_from_the_defaults_and_hashes_on_disk(self, page, run):
        assert re.search(r"dvae: \d+ of \d+ settings differ", page.text)
        head = page.text.index("transformer: ", page.text.index("Configuration"))
        assert re.match(r"model.depth\s*2\s*64", page.text[page.text.index("model.depth", head) :])
        assert next(run.glob("dvae/checkpoints/step-*/SHA256SUMS")).read_text().split()[0] in page.text
        config = read_json(run / "model" / "config.json")
        for kind, part in config["parts"].items():
            assert f"{kind}: weights{part['hash']}" in page.text
        assert config["inputs"]["text"] in page.text

    def test_captions_are_text_and_the_page_requests_nothing(self, page, report):
        assert "<script>red</script> & <b>circle</b>" in page.text
        assert HOSTILE[:-1] + "\\ud800" in page.text
        assert {"script", "b"}.isdisjoint(tag for tag, _ in page.tags)
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        text = report.read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        assert not re.search(r"https?://|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
        assert len(text) < 3_000_000

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": None}, "unexpected contents"),
            ({"images": [{"file": 3, "score": 1}]}, "unexpected contents"),
            ({"images": [{"file": "../secret.png", "score": 1}]}, "no image at"),
        ],
    )
    def test_a_damaged_or_hostile_record_is_left_out(self, run, tmp_path, changes, message):
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        (tmp_path / "run").mkdir()
        record = read_json(run / "samples" / "one" / "sample.json") | changes
        (tmp_path / "run" / "sample.json").write_text(json.dumps(record))
        assert f"Stored samples: {message}" in report_of(tmp_path / "run").text


class TestPartialFolders:
    @pytest.mark.parametrize(
        ("kind", "present", "absent"),
        [
            ("dvae", "curves images codebook configuration checkpoints", "samples attention masks"),
            ("transformer", "curves masks configuration", "codebook"),
            ("clip", "curves images configuration checkpoints", "samples masks"),
        ],
    )
    def test_one_run(self, chain, tmp_path, kind, present, absent):
        shutil.copytree(chain / kind, tmp_path / "run")
        page = report_of(tmp_path / "run")
        assert set(present.split()) <= set(page.sections)
        assert set(absent.split()).isdisjoint(page.sections)
        assert "python scripts/evaluate.py" in page.text
        assert "--save-pretrained runs/model" in page.text
        LoadedModel.from_pretrained(chain / kind).save_pretrained(tmp_path / "model")
        page = report_of(tmp_path / "model")
        assert "checkpoints" in page.sections
        shown = {"masks", "codebook"} & set(page.sections)
        assert shown == {"transformer": {"masks"}, "dvae": {"codebook"}, "clip": set()}[kind]

    def test_a_model_directory(self, chain, tmp_path, prompt):
        shutil.copytree(chain / "model", tmp_path / "model")
        page = report_of(tmp_path / "model")
        assert {"codebook", "masks", "checkpoints"} <= set(page.sections)
        assert "give --prompts" in page.text
        page = report_of(tmp_path / "model", prompts=(prompt,), best_of=2)
        assert {"samples", "reranking", "attention"} <= set(page.sections)

    def test_a_model_without_a_clip_is_unranked(self, dalle, tmp_path, prompt):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path / "model")
        page = report_of(tmp_path / "model", prompts=(prompt,), best_of=2)
        assert "unranked" in page.text
        assert "python scripts/train_clip.py" in page.text
        assert "reranking" not in page.sections

    def test_validation_captions_are_sampled_as_by_the_model(self, chain, dalle, tmp_path):
        shutil.copytree(chain, tmp_path / "run")
        page = report_of(tmp_path / "run", captions=2, best_of=2, temperature=0.7)
        scores = [float(one) for one in re.findall(r"score (-?[\d.]+)", page.text)]
        caption = re.findall(r"\n?([a-z ,]+?)score", page.text.split("seed 0.")[1])[0].strip()
        expected = dalle.generate(caption, n=2, best_of=2, temperature=0.7, progress=False)
        assert scores[:2] == pytest.approx(expected.scores, abs=1e-3)

    def test_no_sample_loads_no_model(self, chain, tmp_path, monkeypatch):
        shutil.copytree(chain, tmp_path / "run")
        monkeypatch.setattr("dalle.report.context.load_model", None)
        page = report_of(tmp_path / "run", sample=False)
        assert {"samples", "attention", "codebook"}.isdisjoint(page.sections)
        assert "--no-sample" in page.text

    def test_an_evaluation_and_the_sheet_of_a_prompts_file(self, run, tmp_path):
        shutil.copy(run / "evaluation.json", tmp_path / "numbers.json")
        for path in (tmp_path, tmp_path / "numbers.json"):
            assert report_of(path).sections[:4] == ["reranking", "evaluation", "pairs", "versions"]
        (tmp_path / "many").mkdir()
        (tmp_path / "many" / "samples.jsonl").write_text("{}\n")
        Image.new("RGB", (70, 50), "green").save(tmp_path / "many" / "sheet.png")
        assert [image.size for image in report_of(tmp_path / "many").images()] == [(70, 50)]

    def test_a_log_without_a_checkpoint_and_values_that_are_not_finite(self, tmp_path):
        lines = [{"step": i, "loss": math.nan, "image_loss": 10**400 if i == 2 else i} for i in (1, 2, 3)]
        last = {"step": 4, "val/loss": None, "val/image_loss": 2.5, "grad_scale_log2": [13.0, 12.0]}
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*lines, last])))
        numbers = {"provenance": {}, "rerank": {"score": {"1": math.nan}, "accuracy": {"1": 0.5, "2": 0.75}}}
        numbers["images"] = {"blur": {r: {"psnr": math.inf, "fid": 9.0} for r in ("0", "1")}}
        (tmp_path / "numbers.json").write_text(json.dumps(numbers))
        page = report_of(tmp_path)
        assert page.charts == ["accuracy of the best (numbers.json)", "image_loss", "fid"]
        assert "image_loss 2.5" in page.text
        assert "gradient scale (Figure 12)" in page.text
        assert "checkpoints" not in page.sections

    def test_damaged_files_leave_the_other_sections(self, chain, change_meta, tmp_path):
        run = tmp_path / "run"
        shutil.copytree(chain, run)
        next((run / "dvae").glob("reconstructions-*.png")).write_bytes(b"no image")
        (run / "model" / "transformer.safetensors").write_bytes(b"no weights")
        (run / "clip" / "checkpoints" / "latest").write_text("step-99999999")
        (run / "strange.json").write_text('["provenance"]')
        file = next((run / "transformer").glob("checkpoints/step-*/meta.json"))
        change_meta(file.parent, model_config={"rings": 3}, versions=None)
        page = report_of(run)
        assert "Images over time: cannot read" in page.text
        assert re.search("Samples, Reranking, Attention: .*not a safetensors file", page.text)
        assert re.search("Masks: .*rings", page.text)
        assert "image_to_text_acc" in page.text
        assert {"curves", "configuration", "codebook"} <= set(page.sections)


def test_mistakes(tmp_path, script):
    (tmp_path / "other.json").write_text("{}")
    for path, words in (("absent", "nothing at"), (".", "holds no run"), ("other.json", "holds no run")):
        with pytest.raises(ValueError, match=words):
            write_report(ReportArgs(tmp_path / path))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "image_loss": 1.0}')
    (tmp_path / "report.html").mkdir()
    assert re.match(r"error: .*report\.html \(Is a directory", script("report", tmp_path).err)
    for name in ("captions", "best_of", "num_codes", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            ReportArgs(**{name: -1})


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_in_a_browser(report, browser, width, scheme):
    """Opened offline: no request, no message, every image shown, nothing too wide, readable colors."""
    viewport = {"width": width, "height": 800}
    context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
    tab, requests, messages = context.new_page(), [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(report.resolve().as_uri())
    tab.wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith("data:")] == [report.resolve().as_uri()]
    assert messages == []
    assert tab.evaluate("document.images.length") >= 14
    assert tab.evaluate("[...document.images].every(one => one.complete && one.naturalWidth)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    colors = tab.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    ground, ink = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
    assert (ground - ink if scheme == "light" else ink - ground) > 400
