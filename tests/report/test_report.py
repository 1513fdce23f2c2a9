"""scripts/report.py: one page about any run folder, whole, without requests, safe with any caption."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.commands.report import ReportArgs, write_report
from dalle.hub.registry import LoadedModel
from dalle.io.files import read_json, write_json
from dalle.report.folder import scan_folder
from dalle.report.page import MAX_BYTES, Table, Text, curve_figure, image_figure, render, thin
from dalle.report.sections import settings

HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>\'"&\ud800'
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """What is in a page: tags with their attributes, text, and whether elements close as they open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]

    def images(self) -> list[Image.Image]:
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert all(re.match(r"data:image/(png|webp|svg\+xml);base64,", source) for source in sources)
        return [decode(source) for source in sources if "svg" not in source[:20]]

    @property
    def charts(self) -> list[str]:
        return [attributes["alt"] for _, attributes in self.tags if attributes.get("class") == "chart"]


def decode(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


@pytest.fixture(scope="module")
def whole(chain: Path, tmp_path_factory) -> Path:
    """A folder as the quick start leaves it, with an evaluation and a sample under a hostile caption beside
    it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(chain, folder)
    evaluated = {
        "model": "abc",
        "temperature": 0.5,
        "provenance": {"hashes": {"dvae": HOSTILE[:20]}},
        "rerank": {
            "captions": 2,
            "score": {"1": 0.1, "2": 0.2, "4": 0.25},
            "right": {"1": 0.5, "2": None, "4": 0.75},
        },
        "images": {"blur": {"0": {"fid": 9.0}, "2": {"fid": 4.0}}},
        "dvae": {"psnr": None},
        "nonfinite": {"dvae.psnr": "inf"},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluated))
    place = folder / "samples" / "one"
    place.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(place / "00.png")
    record = {"prompt": HOSTILE, "best_of": 4, "temperature": 1.0, "seed": 0}
    record["images"] = [{"file": "../one/00.png", "candidate": 2, "score": 0.25, "log_likelihood": {}}]
    (place / "sample.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def report(whole: Path) -> Path:
    """Of the whole, with a hostile caption drawn too."""
    prompts = (
        "a red cross above a blue circle on a white background",
        "<script>red</script> & <b>circle</b>",
    )
    with pytest.warns(UserWarning, match="the vocabulary lacks letters of '<'"):
        return write_report(ReportArgs(whole, prompts=prompts, best_of=4, device="cpu"))


@pytest.fixture(scope="module")
def read(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


SECTIONS = [
    "overview",
    "samples",
    "reranking",
    "attention",
    "curves",
    "images",
    "codebook",
    "masks",
    "evaluation",
    "configuration",
    "checkpoints",
    "versions",
]


class TestWhole:
    def test_every_section_is_there_in_order(self, read):
        assert read.sections == SECTIONS
        links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
        assert links == [f"#{name}" for name in SECTIONS]

    def test_every_image_opens(self, read):
        images = read.images()
        assert len(images) >= 14
        assert min(min(one.size) for one in images) >= 16

    def test_curves_of_every_run(self, read):
        assert {"loss", "image_loss", "text_loss", "perplexity", "image_to_text_acc", "lr"} <= set(
            read.charts
        )
        assert read.charts.count("loss") == 3

    def test_reranking_and_blur_are_the_evaluations(self, read):
        expected = {
            "score of the best (evaluation.json)",
            "right of the best (evaluation.json)",
            "fid",
        }
        assert expected <= set(read.charts)

    def test_configuration_names_what_differs(self, read, whole):
        assert "model.depth" in read.text
        assert re.search(r"dvae: \d+ of \d+ settings differ", read.text)
        head = read.text.index("transformer: ", read.text.index("Configuration"))
        row = read.text[read.text.index("model.depth", head) :][:20]
        assert re.match(r"model.depth\s*2\s*64", row)  # 2 here, 64 in the paper

    def test_hashes_are_those_on_disk(self, read, whole):
        sums = next(whole.glob("dvae/checkpoints/step-*/SHA256SUMS")).read_text().split()
        assert sums[0] in read.text
        config = read_json(whole / "model" / "config.json")
        for kind, part in config["parts"].items():
            assert f"{kind}: weights{part['hash']}" in read.text
        assert config["inputs"]["text"] in read.text

    def test_captions_are_text_and_never_markup(self, read, report):
        assert "<script>red</script> & <b>circle</b>" in read.text
        assert HOSTILE[:-1] in read.text
        assert "\\ud800" in read.text
        tags = {tag for tag, _ in read.tags}
        assert "script" not in tags
        assert "b" not in tags
        assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)

    def test_it_asks_for_nothing_and_forbids_it(self, report):
        text = report.read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        assert not re.search(r"https?://|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
        assert len(text) < 3_000_000

    @pytest.mark.parametrize(
        "record", [[], {"prompt": "a"}, {"images": None}, {"images": [{"file": 3, "score": 1}]}]
    )
    def test_a_sample_of_something_else_is_told(self, whole, tmp_path, record):
        shutil.copy(whole / "evaluation.json", tmp_path)
        (tmp_path / "sample.json").write_text(json.dumps(record))
        text = write_report(ReportArgs(tmp_path)).read_text(encoding="utf-8")
        assert "sample.json is not of scripts/sample.py" in text

    def test_a_sample_never_leads_out_of_its_folder(self, whole, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(whole / "samples" / "one", folder)
        Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
        record = read_json(folder / "sample.json")
        record["images"][0]["file"] = "../secret.png"
        (folder / "sample.json").write_text(json.dumps(record))
        text = write_report(ReportArgs(folder)).read_text(encoding="utf-8")
        assert "Samples: no image at" in text


def made(folder: Path, **settings) -> Page:
    return Page(write_report(ReportArgs(folder, device="cpu", **settings)).read_text(encoding="utf-8"))


class TestParts:
    def test_a_dvae_alone(self, chain, tmp_path):
        shutil.copytree(chain / "dvae", tmp_path / "dvae")
        found = made(tmp_path / "dvae")
        assert {"curves", "images", "codebook", "configuration", "checkpoints"} <= set(found.sections)
        assert {"samples", "attention", "masks"}.isdisjoint(found.sections)
        assert "python scripts/sample.py --prompt WORDS --save-pretrained runs/model" in found.text
        assert "python scripts/train_transformer.py" in found.text
        assert "python scripts/evaluate.py" in found.text

    def test_a_transformer_alone(self, chain, tmp_path):
        shutil.copytree(chain / "transformer", tmp_path / "run")
        found = made(tmp_path / "run")
        assert {"curves", "masks", "configuration"} <= set(found.sections)
        assert "codebook" not in found.sections

    def test_a_clip_alone(self, chain, tmp_path):
        shutil.copytree(chain / "clip", tmp_path / "run")
        assert {"curves", "images", "configuration", "checkpoints"} <= set(made(tmp_path / "run").sections)

    def test_a_model_directory_needs_captions_to_draw(self, chain, tmp_path, prompt):
        shutil.copytree(chain / "model", tmp_path / "model")
        found = made(tmp_path / "model")
        assert {"codebook", "masks", "checkpoints"} <= set(found.sections)
        assert "give --prompts" in found.text
        found = made(tmp_path / "model", prompts=(prompt,), best_of=2)
        assert {"samples", "reranking", "attention"} <= set(found.sections)

    @pytest.mark.parametrize("kind", ["dvae", "transformer", "clip"])
    def test_a_directory_of_one_part(self, chain, tmp_path, kind):
        LoadedModel.from_pretrained(chain / kind).save_pretrained(tmp_path / "model")
        found = made(tmp_path / "model")
        assert "checkpoints" in found.sections
        assert ("masks" in found.sections) == (kind == "transformer")
        assert ("codebook" in found.sections) == (kind == "dvae")

    def test_a_transformer_of_another_version_has_no_masks(self, chain, tmp_path):
        shutil.copytree(chain / "transformer", tmp_path / "run")
        file = next((tmp_path / "run").glob("checkpoints/step-*/meta.json"))
        meta = read_json(file)
        for config, said in (({"rings": 3}, "Masks: .*rings"), (None, "Masks: ")):
            write_json(file, meta | {"model_config": config})
            assert re.search(said, made(tmp_path / "run").text)

    def test_a_model_without_a_clip_is_unranked(self, dalle, tmp_path, prompt):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path / "model")
        found = made(tmp_path / "model", prompts=(prompt,), best_of=2)
        assert "Unranked: there is no CLIP" in found.text
        assert "python scripts/train_clip.py" in found.text
        assert "reranking" not in found.sections

    def test_the_captions_are_held_out_ones_and_draw_as_the_model_does(self, chain, dalle, tmp_path):
        shutil.copytree(chain, tmp_path / "run")
        found = made(tmp_path / "run", captions=2, best_of=2, temperature=0.7)
        scores = [float(one) for one in re.findall(r"(?:score|worst of 2:) (-?[\d.]+)", found.text)]
        captions = re.findall(r"\n?([a-z ,]+?)score", found.text.split("seed 0.")[1])
        drawn = dalle.generate(captions[0].strip(), n=2, best_of=2, temperature=0.7, progress=False)
        assert scores[:2] == pytest.approx(drawn.scores, abs=1e-3)

    def test_no_sample_loads_no_model(self, chain, tmp_path, monkeypatch):
        shutil.copytree(chain, tmp_path / "run")
        monkeypatch.setattr("dalle.report.context.load_model", None)
        found = made(tmp_path / "run", sample=False)
        assert {"samples", "attention", "codebook"}.isdisjoint(found.sections)
        assert "nothing is sampled with --no-sample" in found.text

    def test_an_evaluation_alone(self, whole, tmp_path):
        shutil.copy(whole / "evaluation.json", tmp_path / "numbers.json")
        for place in (tmp_path, tmp_path / "numbers.json"):
            found = made(place)
            assert found.sections[:3] == ["overview", "reranking", "evaluation"]
        assert (tmp_path / "report.html").is_file()

    def test_a_file_of_captions_shows_its_sheet(self, tmp_path):
        (tmp_path / "many").mkdir()
        (tmp_path / "many" / "samples.jsonl").write_text("{}\n")
        Image.new("RGB", (70, 50), "green").save(tmp_path / "many" / "sheet.png")
        found = made(tmp_path / "many")
        assert "samples" in found.sections
        assert [one.size for one in found.images()] == [(70, 50)]

    def test_settings_are_told_exactly(self):
        assert settings({"a": {"lr": 1.25e-6, "on": True}, "b": [1, 0.1234567], "c": None, "d": "red"}) == {
            "a.lr": "1.25e-06",
            "a.on": "true",
            "b": "[1, 0.1234567]",
            "c": "null",
            "d": "red",
        }

    def test_a_run_that_has_no_checkpoint_yet(self, chain, tmp_path):
        (tmp_path / "run").mkdir()
        shutil.copy(chain / "clip" / "log.jsonl", tmp_path / "run")
        found = made(tmp_path / "run")
        assert "curves" in found.sections
        assert "checkpoints" not in found.sections

    def test_a_loss_without_a_finite_value_takes_no_other_curve_away(self, tmp_path):
        lines = [{"step": i, "loss": math.nan, "image_loss": 10**400 if i == 2 else i} for i in (1, 2, 3)]
        lines.append({"step": 4, "val/loss": None, "val/image_loss": 2.5})
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        numbers = {"provenance": {}, "rerank": {"score": {"1": math.nan}, "right": {"1": 0.5, "2": 0.75}}}
        numbers["images"] = {"blur": {r: {"psnr": math.inf, "fid": 9.0} for r in ("0", "1")}}
        (tmp_path / "numbers.json").write_text(json.dumps(numbers))
        found = made(tmp_path)
        assert found.charts == ["right of the best (numbers.json)", "image_loss", "fid"]
        assert "image_loss 2.5" in found.text

    def test_gradient_scales_are_drawn_where_logged(self, tmp_path):
        lines = [{"step": i, "loss": 1.0, "image_loss": 1.0, "grad_scale_log2": [13.0, 12.0]} for i in (1, 2)]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert "gradient scale (Figure 12)" in made(tmp_path).text

    def test_damaged_files_are_told_and_the_rest_is_there(self, chain, tmp_path):
        shutil.copytree(chain, tmp_path / "run")
        next((tmp_path / "run" / "dvae").glob("reconstructions-*.png")).write_bytes(b"no image")
        (tmp_path / "run" / "model" / "transformer.safetensors").write_bytes(b"no weights")
        (tmp_path / "run" / "clip" / "checkpoints" / "latest").write_text("step-99999999")
        (tmp_path / "run" / "strange.json").write_text('["provenance"]')
        found = made(tmp_path / "run")
        assert "Images over time: cannot read" in found.text
        assert "Samples, Reranking, Attention: " in found.text
        assert "not a safetensors file" in found.text
        assert "image_to_text_acc" in found.text  # of the log, whose checkpoint is lost
        assert {"curves", "configuration", "codebook"} <= set(found.sections)


class TestOddValues:
    """What other programs may have left in a folder is left out, and the page is made of the rest."""

    @pytest.mark.parametrize(
        "odd",
        [{"versions": None}, {"inputs": ["x"]}, {"step": None}, {"config": [1]}],
        ids=lambda odd: next(iter(odd)),
    )
    def test_in_a_checkpoint(self, chain, tmp_path, odd):
        shutil.copytree(chain / "clip", tmp_path / "run")
        file = next((tmp_path / "run").glob("checkpoints/step-*/meta.json"))
        write_json(file, read_json(file) | odd)
        assert "checkpoints" in made(tmp_path / "run").sections

    def test_of_an_unknown_kind_there_is_no_run(self, chain, tmp_path):
        shutil.copytree(chain / "clip", tmp_path / "run")
        file = next((tmp_path / "run").glob("checkpoints/step-*/meta.json"))
        write_json(file, read_json(file) | {"kind": ["clip"]})
        with pytest.raises(ValueError, match="holds no run"):
            write_report(ReportArgs(tmp_path / "run"))

    def test_in_an_evaluation_and_in_a_log(self, tmp_path):
        write_json(
            tmp_path / "e.json",
            {"caption_accuracy": {"true": None}, "caption_accuracy_new_pairs": {"true": 1}},
        )
        (tmp_path / "x.json").mkdir()
        (tmp_path / "log.jsonl").write_text('{"step": 1, "image_loss": 1.0, "grad_scale_log2": "x"}\n')
        assert {"evaluation", "curves"} <= set(made(tmp_path).sections)


class TestMistakes:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"nothing at .*absent; give the folder of a run, or make one"):
            write_report(ReportArgs(tmp_path / "absent"))
        with pytest.raises(ValueError, match="holds no run, model, samples or evaluation"):
            write_report(ReportArgs(tmp_path))
        (tmp_path / "log.jsonl").write_text('{"step": 1, "image_loss": 1.0}\n')
        (tmp_path / "report.html").mkdir()
        with pytest.raises(ValueError, match=r"report\.html is a directory"):
            write_report(ReportArgs(tmp_path))
        write_json(tmp_path / "other.json", {"a": 1})
        with pytest.raises(ValueError, match="holds no run"):
            write_report(ReportArgs(tmp_path / "other.json"))

    @pytest.mark.parametrize(
        "changes", [{"captions": 0}, {"best_of": 0}, {"num_codes": 0}, {"temperature": -1.0}]
    )
    def test_settings_that_mean_nothing(self, changes):
        with pytest.raises(ValueError, match=r"must be|temperature"):
            ReportArgs(**changes)

    def test_the_script(self, tmp_path, script):
        assert re.match(r"error: .*holds no run", script("report", tmp_path).err)
        help = " ".join(script("report", "--help").out.replace("\u2502", " ").split())
        for words in ("python scripts/report.py runs/quickstart", "--no-sample", "--prompts", "--best-of"):
            assert words in help


class TestPieces:
    def test_the_newest_run_of_the_folder_itself_comes_first(self, chain):
        found = scan_folder(chain)
        assert list(found.runs) == ["dvae", "transformer", "clip"]
        assert found.model == chain / "model"
        assert scan_folder(chain / "clip").runs.keys() == {"clip"}

    def test_a_large_image_is_coded_small(self):
        noise = torch.randint(
            256, (400, 1700, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        figure = image_figure(Image.fromarray(noise.numpy()), "noise")
        assert max(decode(figure.source).size) <= 1600
        assert len(figure.source) < 4 / 3 * MAX_BYTES + 200
        small = decode(image_figure(Image.new("RGB", (40, 30), "blue"), "blue").source)
        assert (small.format, small.size, small.getpixel((5, 5))) == ("PNG", (40, 30), (0, 0, 255))

    def test_every_text_is_escaped(self):
        page = render(
            HOSTILE, HOSTILE, [(HOSTILE, [Text(HOSTILE), Table([[HOSTILE]], [HOSTILE])])], [HOSTILE]
        )
        assert {"script", "img"}.isdisjoint(tag for tag, _ in Page(page).tags)
        assert Page(page).text.count(HOSTILE[:-1]) == 9

    def test_a_curve_is_where_its_numbers_say(self):
        figure = curve_figure("loss", {"training": ([(0, 2.0), (10, 4.0), (20, 3.0), (30, math.nan)], "-")})
        (x0, y0), (x1, y1), (x2, y2) = line_points(figure)
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
        assert y1 < y2 < y0  # SVG's y axis points down
        assert y0 - y2 == pytest.approx((y0 - y1) / 2, abs=0.11)

    def test_log2_puts_1_2_4_at_equal_distances(self):
        figure = curve_figure("best", {"score": ([(1, 0.1), (2, 0.2), (4, 0.3)], "o-")}, "N", log2=True)
        (x0, _), (x1, _), (x2, _) = line_points(figure)
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)

    def test_no_chart_without_a_finite_value(self):
        assert (
            curve_figure("a", {"training": ([(1, math.nan)], "-"), "chance": ([(1, 2.0)], "level")}) is None
        )

    def test_thinning_keeps_every_spike(self):
        points = [(i, 0.0) for i in range(10_000)]
        points[1234], points[7777] = (1234, 9.0), (7777, -9.0)
        kept = thin(points, 100)
        assert len(kept) <= 100
        assert {(1234, 9.0), (7777, -9.0)} <= set(kept)
        assert kept == sorted(kept)


def line_points(figure) -> list[tuple[float, float]]:
    """Points of the first curve of a chart, in the SVG's units."""
    svg = base64.b64decode(figure.source.split(",")[1]).decode()
    path = re.search(r'<path d="([^"]+)" clip-path="[^"]*" style="fill: none; stroke: #1f77b4', svg)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_in_a_browser(browser, report, width, scheme):
    """Opened offline from the disk: no request, no complaint, every image drawn, nothing sticks out."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    tab, asked, said = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.goto(report.resolve().as_uri())
    tab.wait_for_load_state("networkidle")
    assert [url for url in asked if not url.startswith("data:")] == [report.resolve().as_uri()]
    assert said == []
    assert (
        tab.evaluate("[...document.images].filter(one => !one.complete || one.naturalWidth === 0).length")
        == 0
    )
    assert tab.evaluate("document.images.length") >= 14
    assert tab.evaluate("[...document.querySelectorAll('section')].map(one => one.id)") == SECTIONS
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    ground, ink = tab.evaluate("(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))")
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, ink)]
    assert (light[0] - light[1] > 400) if scheme == "light" else (light[1] - light[0] > 400)
    context.close()
