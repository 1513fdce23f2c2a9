"""scripts/evaluate.py: every metric on a tiny model, the report, and mistakes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.commands.evaluate import EvaluateArgs, evaluate
from dalle.data import DataConfig
from dalle.evals.context import EvalContext
from dalle.evals.suite import METRICS
from dalle.hub.registry import weights_hash
from dalle.io.files import read_json
from dalle.io.images import to_tensor
from dalle.pretrained.openai_clip import load_scorer
from tests.helpers.external import open_clip_weights
from tests.helpers.scenes import put


@pytest.fixture(scope="module")
def run(chain: Path, tmp_path_factory) -> EvaluateArgs:
    sizes = {"num_samples": 12, "num_prompts": 3, "best_of": 4, "batch": 5, "blur_radii": (0, 2)}
    folder = tmp_path_factory.mktemp("statistics")
    return EvaluateArgs(model=chain / "model", stats_dir=folder, device="cpu", **sizes)


@pytest.fixture(scope="module")
def report(run: EvaluateArgs, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("evaluate") / "new" / "report.json"
    metrics = ("dvae", "transformer", "clip", "images", "rerank")
    evaluate(replace(run, metrics=metrics, feature_extractor="clip", json=file))
    return read_json(file)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Nine images, of which six have their class as caption, in training and validation."""
    for i in range(9):
        name = ("red", "green", "blue")[i % 3]
        put(tmp_path, f"{i}.png", Image.new("RGB", (40, 40), name), name.title() if i < 6 else f"a {name}")
    return DataConfig(path=str(tmp_path), val_path=str(tmp_path), workers=0)


class TestReport:
    def test_each_metric_has_its_numbers(self, report):
        assert report["dvae"]["images"] == report["transformer"]["pairs"] == report["clip"]["images"] == 12
        assert {"nats_per_pixel_value", "psnr", "ssim", "perplexity"} <= report["dvae"].keys()
        assert report["transformer"]["image_tokens"] == 12 * 16
        assert report["transformer"]["bound"].keys() == {"argmax", "sampled"}
        assert report["clip"]["retrieval"].keys() == {"image_to_text_acc", "text_to_image_acc"}
        counts = {"num_generated": 3, "num_real": 12, "best_of": 4, "same_clip_as_ranker": True}
        assert {name: report["images"][name] for name in counts} == counts
        assert report["images"]["blur"].keys() == {"0", "2"}
        for name in ("score", "accuracy", "fd_clip"):
            assert report["rerank"][name].keys() == {"1", "2", "4"}

    def test_the_score_rises_with_best_of_to_that_of_generate(self, report, run, dalle):
        curve = report["rerank"]["score"]
        assert curve["1"] <= curve["2"] <= curve["4"]
        prompts = EvalContext(run, dalle).prompts()
        best = dalle.to_precision("auto").generate(prompts, 1, 4, 0, progress=False, truncate=True)
        assert curve["4"] == pytest.approx(sum(one.scores[0] for one in best) / 3, rel=1e-5)

    def test_the_provenance_names_models_and_data(self, report, dalle):
        hashes, facts = report["provenance"]["hashes"], report["provenance"]["data"]
        assert f"{hashes['dvae']}-{hashes['transformer']}-{hashes['clip']}" == report["model"] == dalle.hash
        assert (hashes["text"], hashes["feature_extractor"]) == (dalle.text.hash, hashes["clip"])
        assert (facts["path"], facts["max_pairs"], facts["resolution"]) == ("shapes", 12, 32)
        assert "Lanczos" in report["provenance"]["resize"]["images"]
        assert report["seed"] == 0

    def test_the_same_seed_gives_the_same_numbers(self, run, report):
        again = evaluate(replace(run, metrics=("transformer", "rerank"), batch=7))
        assert again["rerank"]["score"] == pytest.approx(report["rerank"]["score"], abs=1e-5)
        text_loss = report["transformer"]["text_loss"]
        assert again["transformer"]["text_loss"] == pytest.approx(text_loss, rel=1e-5)


class TestOwnImages:
    def test_classes_are_the_captions(self, run, data, tmp_path):
        classes = tmp_path / "classes"
        classes.write_text("red\ngreen\nblue\n")
        asked = replace(run, metrics=("clip",), data=data, classes=classes, templates=("a {} circle",))
        found = evaluate(asked)["clip"]
        assert found["images"] == 9
        assert found["zero_shot"]["images"] == 6  # captions of the other three are no class
        assert found["zero_shot"]["acc_chance"] == pytest.approx(1 / 3)
        attack = {"acc_clean", "acc_attacked", "attack_success", "attack_success_clean"}
        assert found["typographic_attack"].keys() == attack

    def test_at_most_num_samples_come_in_order(self, run, data, dalle):
        def sizes(count: int, batch: int) -> list[int]:
            context = EvalContext(replace(run, data=data, num_samples=count, batch=batch), dalle)
            return [len(pixels) for pixels in context.pixels()]

        assert sizes(7, 3) == [3, 3, 1]
        assert sum(sizes(100, 4)) == 9

    def test_provenance_differs_for_other_images(self, run, data, dalle):
        """Else statistics of real images would be used for others."""
        filtered = replace(data, filters=replace(data.filters, min_words=3))
        options = ({"data": data}, {"data": filtered}, {"data": data, "num_samples": 8})
        facts, *others = (EvalContext(replace(run, **one), dalle).facts() for one in options)
        assert facts not in others

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("dog\ncat\n", "class, such as 'dog'"),
            ("one\n", "two or more"),
            ("one\nOne \n", "two or more"),
            (None, "class name per line"),
        ],
    )
    def test_wrong_classes_are_refused(self, run, data, tmp_path, text, message):
        file = tmp_path / "classes"
        if text:
            file.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate(replace(run, metrics=("clip",), data=data, classes=file))


@pytest.fixture(scope="module")
def external(tmp_path_factory) -> Path:
    """clip.pt of open_clip, which does not hold its activation."""
    file = tmp_path_factory.mktemp("published") / "clip.pt"
    torch.save(open_clip_weights(), file)
    return file


class TestExternalCLIP:
    def test_it_measures_and_the_models_clip_still_ranks(self, run, report, external):
        found = evaluate(replace(run, metrics=("clip", "rerank"), clip=external, quick_gelu=True))
        assert found["provenance"]["hashes"]["clip"] != report["provenance"]["hashes"]["clip"]
        assert found["rerank"]["score"] == pytest.approx(report["rerank"]["score"])
        assert "ranked_by" not in found

    def test_it_ranks_on_request(self, run, report, external, dalle):
        asked = replace(run, metrics=("rerank",), clip=external, rerank_with="clip")
        found = [evaluate(replace(asked, quick_gelu=quick_gelu)) for quick_gelu in (True, False)]
        scorer = load_scorer(external, "cpu", True)
        prompts = EvalContext(run, dalle).prompts()
        generations = dalle.generate(prompts, 4, 4, 0, progress=False, truncate=True)
        best = [float(scorer.score(to_tensor(one.images), one.prompt).max()) for one in generations]
        score = found[0]["rerank"]["score"]
        assert score["4"] == pytest.approx(sum(best) / 3, abs=1e-3)  # images of 8 bits here
        assert score != found[1]["rerank"]["score"]
        assert found[0]["ranked_by"] == found[0]["provenance"]["hashes"]["clip"] == weights_hash(scorer.model)
        assert found[0]["model"] == report["model"]

    def test_the_ranker_is_recorded_with_the_images(self, run, external):
        asked = replace(run, metrics=("images",), feature_extractor="clip", clip=external, quick_gelu=True)
        assert evaluate(asked)["images"]["same_clip_as_ranker"] is False
        assert evaluate(replace(asked, rerank_with="clip"))["images"]["same_clip_as_ranker"] is True

    def test_a_model_without_a_clip_needs_it(self, run, dalle, external, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path / "model")
        run = replace(run, model=tmp_path / "model", num_prompts=2, best_of=2)
        for metric, message in (("rerank", "rank with"), ("clip", "measure with")):
            with pytest.raises(ValueError, match=f"no CLIP to {message}"):
                evaluate(replace(run, metrics=(metric,)))
        asked = replace(run, metrics=("shapes",), clip=external, quick_gelu=True)
        with pytest.raises(ValueError, match="--clip FILE --rerank-with clip"):
            evaluate(asked)
        found = evaluate(replace(asked, rerank_with="clip"))
        assert found["shapes"]["val"]["acc_real"] == 1

    def test_an_unknown_activation_is_refused(self, run, external):
        with pytest.raises(ValueError, match="activation"):
            evaluate(replace(run, clip=external))


@pytest.mark.parametrize("name", ["clip", "model"])
def test_a_run_as_clip_measures_what_the_models_clip_does(run, report, chain, name):
    assert evaluate(replace(run, metrics=("clip",), clip=chain / name))["clip"] == report["clip"]


def test_counts_are_printed_whole_and_json_is_valid(run, monkeypatch, tmp_path, capsys):
    numbers = {"psnr": math.inf, "a": {"b": math.nan, "c": 1.5}, "d": -math.inf, "e": "inf", "f": 7}
    monkeypatch.setitem(METRICS, "dvae", lambda context: numbers)
    found = evaluate(replace(run, metrics=("dvae",), json=tmp_path / "report.json"))
    assert "Infinity" not in (tmp_path / "report.json").read_text("utf-8")
    assert read_json(tmp_path / "report.json") == found
    assert found["dvae"] == numbers | {"psnr": None, "a": {"b": None, "c": 1.5}, "d": None}
    assert "dvae psnr inf  d -inf  f 7\ndvae a b nan  c 1.500\n" in capsys.readouterr().out
    assert found["nonfinite"] == {"dvae.psnr": "inf", "dvae.a.b": "nan", "dvae.d": "-inf"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be positive"),
        ({"metrics": ()}, "one or more"),
        ({"metrics": ("dvae", "dvae")}, "each once"),
        ({"blur_radii": (0, -1)}, "0 or more"),
        ({"quick_gelu": True}, "give it with --clip"),
        ({"rerank_with": "clip"}, "give it with --clip"),
        ({"clip": Path(__file__).parent, "quick_gelu": True}, "--quick-gelu is for the file"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateArgs(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("images",)}, r"pt_inception-2015-12-05-6726825d.pth.*--feature-extractor"),
        ({"metrics": ("images",), "feature_extractor": "nowhere.pth"}, r"no file .*nowhere.pth"),
        ({"metrics": ("clip",), "clip": Path(__file__).parent}, "run or model directory"),
    ],
)
def test_missing_files_are_refused(run, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(replace(run, **changes))
