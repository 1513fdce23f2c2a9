"""scripts/evaluate.py: every part on a tiny model, what the report holds, and mistakes told in one line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.commands.evaluate import EvaluateArgs, _print, evaluate, finite
from dalle.data import DataConfig
from dalle.dvae import DVAE
from dalle.evals.context import ValidationSet, read_classes
from dalle.hub.registry import weights_hash
from dalle.io.files import read_json
from dalle.io.images import to_tensor
from dalle.pipelines.dalle import DALLE
from dalle.pretrained.openai_clip import load_scorer

COLORS = {"red": (230, 20, 20), "green": (20, 200, 30), "blue": (30, 40, 230)}


@pytest.fixture(scope="module")
def run(chain: Path, tmp_path_factory) -> EvaluateArgs:
    return EvaluateArgs(
        model=chain / "model",
        num_samples=12,
        num_prompts=3,
        best_of=4,
        batch=5,
        blur_radii=(0, 2),
        device="cpu",
        stats_dir=tmp_path_factory.mktemp("statistics"),
    )


@pytest.fixture(scope="module")
def report(run: EvaluateArgs, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("evaluate") / "new" / "report.json"
    metrics = ("dvae", "transformer", "clip", "images", "rerank")
    evaluate(replace(run, metrics=metrics, feature_extractor="clip", json=file))
    return read_json(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images whose captions are their classes, all held out by another folder."""
    for i in range(9):
        name = list(COLORS)[i % 3]
        Image.new("RGB", (40, 40), COLORS[name]).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(name.title() if i < 6 else f"something {name}", encoding="utf-8")
    return tmp_path


class TestReport:
    def test_each_part_has_its_numbers(self, report):
        assert report["dvae"]["images"] == report["transformer"]["pairs"] == report["clip"]["images"] == 12
        assert {"nats_per_pixel_value", "psnr", "ssim", "perplexity"} <= report["dvae"].keys()
        assert report["transformer"]["image_tokens"] == 12 * 16
        assert {"argmax", "sampled"} == report["transformer"]["bound"].keys()
        assert report["clip"]["retrieval"].keys() == {"image_to_text_acc", "text_to_image_acc"}
        assert (
            report["images"]["num_generated"],
            report["images"]["num_real"],
            report["images"]["best_of"],
        ) == (
            3,
            12,
            4,
        )
        assert report["images"]["blur"].keys() == {"0", "2"}
        assert report["images"]["same_clip_as_ranker"] is True
        for name in ("score", "accuracy", "fd_clip"):
            assert report["rerank"][name].keys() == {"1", "2", "4"}

    def test_the_best_of_more_scores_higher_and_ends_where_sampling_does(self, report, run):
        curve = report["rerank"]["score"]
        assert curve["1"] <= curve["2"] <= curve["4"]
        model = DALLE.from_pretrained(run.model)
        prompts = ValidationSet(run.data, 32, 12, 5, 0).prompts(3)
        drawn = model.to_precision("auto").generate(prompts, 1, 4, 0, progress=False, truncate=True)
        assert curve["4"] == pytest.approx(sum(one.scores[0] for one in drawn) / 3, rel=1e-5)

    def test_it_says_what_the_numbers_rest_on(self, report, run):
        model = DALLE.from_pretrained(run.model)
        rests = report["provenance"]
        assert report["model"] == model.hash
        assert (
            f"{rests['hashes']['dvae']}-{rests['hashes']['transformer']}-{rests['hashes']['clip']}"
            == model.hash
        )
        assert rests["hashes"]["text"] == model.text.hash
        assert rests["hashes"]["feature_extractor"] == rests["hashes"]["clip"]
        facts = ValidationSet(run.data, 32, 12, 5, 0).provenance()
        assert (facts["path"], facts["max_pairs"], facts["resolution"]) == ("shapes", 12, 32)
        assert rests["data"] == facts
        assert "Lanczos" in rests["resize"]["images"]
        assert report["seed"] == 0

    def test_the_same_seed_gives_the_same_numbers(self, run, report):
        again = evaluate(replace(run, metrics=("transformer", "rerank"), batch=7))
        assert again["rerank"]["score"] == pytest.approx(report["rerank"]["score"], abs=1e-5)
        assert again["transformer"]["text_loss"] == pytest.approx(
            report["transformer"]["text_loss"], rel=1e-5
        )

    def test_no_number_is_missing_or_infinite(self, report):
        assert "NaN" not in json.dumps(report)
        assert "Infinity" not in json.dumps(report)


class TestOwnImages:
    def test_classes_are_the_captions(self, run, folder, tmp_path_factory):
        classes = tmp_path_factory.mktemp("classes") / "names.txt"
        classes.write_text("red\ngreen\nblue\n", encoding="utf-8")
        data = DataConfig(path=str(folder), val_path=str(folder), workers=0)
        found = evaluate(
            replace(run, metrics=("clip",), data=data, classes=classes, templates=("a {} circle",))
        )["clip"]
        assert found["images"] == 9
        assert found["zero_shot"]["images"] == 6  # captions of the other three are no class
        assert found["zero_shot"]["acc_chance"] == pytest.approx(1 / 3)
        assert set(found["typographic_attack"]) == {
            "acc_clean",
            "acc_attacked",
            "attack_success",
            "attack_success_clean",
        }

    def test_pairs_come_in_order_and_no_more_than_asked_for(self, folder):
        data = DataConfig(path=str(folder), val_path=str(folder), workers=0)
        pairs = ValidationSet(data, 32, 7, 3, 0)
        sizes = [len(batch.captions) for batch in pairs.batches()]
        assert sizes == [3, 3, 1]
        assert sum(len(batch.captions) for batch in ValidationSet(data, 32, 100, 4, 0).batches()) == 9

    def test_other_images_are_other_facts(self, folder):
        """Else statistics of real images would be taken for those of others."""
        data = DataConfig(path=str(folder), val_path=str(folder), workers=0)
        facts = ValidationSet(data, 32, 9, 3, 0).provenance()
        for changed, count, side in (
            (replace(data, filters=replace(data.filters, min_words=3)), 9, 32),
            (data, 8, 32),
            (data, 9, 16),
        ):
            assert ValidationSet(changed, side, count, 3, 0).provenance() != facts

    def test_classes_that_no_caption_names(self, folder):
        data = DataConfig(path=str(folder), val_path=str(folder), workers=0)
        with pytest.raises(
            ValueError, match=r"no validation caption .* is the name of a class, such as 'dog'"
        ):
            list(ValidationSet(data, 32, 9, 3, 0).labeled(["dog", "cat"]))

    def test_class_files_that_cannot_be(self, tmp_path):
        with pytest.raises(ValueError, match="a class name per line"):
            read_classes(tmp_path / "absent.txt")
        for text in ("one\n", "one\nOne \n"):
            (tmp_path / "few.txt").write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match="two or more class names"):
                read_classes(tmp_path / "few.txt")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """clip.pt of open_clip's layout, which does not tell its activation."""
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=16, vocab_size=49408, width=64, heads=1, layers=1)
    file = tmp_path_factory.mktemp("published") / "clip.pt"
    torch.save(open_clip.CLIP(16, vision, text, quick_gelu=True).state_dict(), file)
    return file


class TestPublishedCLIP:
    def test_it_measures_and_the_ranking_stays_the_models(self, run, report, published):
        for quick_gelu in (True, False):
            found = evaluate(replace(run, metrics=("clip", "rerank"), clip=published, quick_gelu=quick_gelu))
            assert found["provenance"]["hashes"]["clip"] != report["provenance"]["hashes"]["clip"]
            assert found["rerank"]["score"] == pytest.approx(report["rerank"]["score"])
            assert "ranked_by" not in found

    def test_it_ranks_where_asked_to(self, run, report, published):
        asked = replace(run, metrics=("rerank",), clip=published, rerank_with="clip")
        found = [evaluate(replace(asked, quick_gelu=quick_gelu)) for quick_gelu in (True, False)]
        scorer = load_scorer(published, "cpu", True)
        prompts = ValidationSet(run.data, 32, 12, 5, 0).prompts(3)
        model = DALLE.from_pretrained(run.model)
        drawn = model.generate(prompts, 4, 4, 0, progress=False, truncate=True)
        scores = [
            scorer.score(to_tensor(one.images), prompt) for one, prompt in zip(drawn, prompts, strict=True)
        ]
        expected = sum(float(one.max()) for one in scores) / 3
        assert found[0]["rerank"]["score"]["4"] == pytest.approx(expected, abs=1e-3)  # images of 8 bits here
        assert found[0]["rerank"]["score"] != found[1]["rerank"]["score"]
        assert found[0]["ranked_by"] == found[0]["provenance"]["hashes"]["clip"] == weights_hash(scorer.model)
        assert found[0]["model"] == report["model"]

    def test_who_ranks_is_told_of_the_images(self, run, published):
        asked = replace(run, metrics=("images",), feature_extractor="clip", clip=published, quick_gelu=True)
        assert evaluate(asked)["images"]["same_clip_as_ranker"] is False
        assert evaluate(replace(asked, rerank_with="clip"))["images"]["same_clip_as_ranker"] is True

    def test_a_model_without_a_clip_is_ranked_by_it(self, run, dalle, published, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path / "model")
        asked = replace(run, model=tmp_path / "model", metrics=("shapes",), clip=published, quick_gelu=True)
        with pytest.raises(ValueError, match="--clip FILE --rerank-with clip"):
            evaluate(asked)
        assert (
            evaluate(replace(asked, rerank_with="clip", num_prompts=2, best_of=2))["shapes"]["held_out"][
                "acc_real"
            ]
            == 1
        )

    def test_an_activation_that_no_file_tells_is_asked_for(self, run, published):
        with pytest.raises(ValueError, match="activation"):
            evaluate(replace(run, clip=published))


class TestRunOfTheLibrary:
    @pytest.mark.parametrize("name", ["clip", "model"])
    def test_as_clip_it_measures_what_it_does_in_the_model(self, run, report, chain, name):
        found = evaluate(replace(run, metrics=("clip",), clip=chain / name))
        assert found["clip"] == report["clip"]

    def test_a_directory_of_something_else_is_told(self, run, tmp_path):
        with pytest.raises(ValueError, match="expected a run or model directory of this library"):
            evaluate(replace(run, metrics=("clip",), clip=tmp_path))

    def test_the_activation_is_of_a_file(self, run, chain):
        with pytest.raises(ValueError, match="--quick-gelu is for the file of a CLIP"):
            replace(run, clip=chain / "clip", quick_gelu=True)


def test_counts_are_printed_whole(capsys):
    _print("dvae", {"psnr": 21.5, "images": 200, "codes": {"used": 7}})
    assert capsys.readouterr().out == "dvae psnr 21.500  images 200\ndvae codes used 7\n"


def strict(text: str) -> dict:
    """JSON as its standard has it: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


class TestInfinity:
    def test_a_image_kept_exactly_leaves_valid_json(self, run, monkeypatch, tmp_path):
        monkeypatch.setattr(DVAE, "decode", lambda model, tokens, grid=None: self.seen)
        monkeypatch.setattr(DVAE, "encode", self.encode)
        found = evaluate(replace(run, metrics=("dvae",), json=tmp_path / "report.json"))
        written = strict((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert written == found
        assert written["dvae"]["psnr"] is None
        assert written["dvae"]["ssim"] == pytest.approx(1)
        assert written["nonfinite"] == {"dvae.psnr": "inf"}

    def encode(self, pixels):
        self.seen = pixels
        return torch.zeros(len(pixels), 16, dtype=torch.int64)

    def test_every_depth_and_sign(self):
        report = {"a": {"b": math.nan, "c": 1.5}, "d": -math.inf, "e": [1], "f": "inf", "g": True}
        kept = {"a": {"b": None, "c": 1.5}, "d": None, "e": [1], "f": "inf", "g": True}
        assert finite(report) == kept | {"nonfinite": {"a.b": "nan", "d": "-inf"}}
        assert finite({"a": 1.0}) == {"a": 1.0}


class TestMistakes:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"num_samples": 0}, "num-samples must be positive"),
            ({"metrics": ()}, "one or more"),
            ({"metrics": ("dvae", "dvae")}, "each once"),
            ({"blur_radii": (0, -1)}, "0 or more"),
            ({"blur_radii": ()}, "0 or more"),
            ({"lpips_weights": Path("alex.pth")}, "give both, or neither"),
            ({"quick_gelu": True}, "give it with --clip"),
            ({"rerank_with": "clip"}, "give it with --clip"),
        ],
    )
    def test_fields(self, changes, said):
        with pytest.raises(ValueError, match=said):
            EvaluateArgs(**changes)

    def test_images_without_weights_say_how_to_get_them(self, run):
        with pytest.raises(ValueError, match=r"pt_inception-2015-12-05-6726825d.pth.*--feature-extractor"):
            evaluate(replace(run, metrics=("images",)))
        with pytest.raises(ValueError, match=r"no file .*nowhere.pth"):
            evaluate(replace(run, metrics=("images",), feature_extractor="nowhere.pth"))

    def test_a_model_without_a_clip(self, run, dalle, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match="no CLIP to rank with"):
            evaluate(replace(run, model=tmp_path / "model", metrics=("rerank",)))
        with pytest.raises(ValueError, match="no CLIP to measure with"):
            evaluate(replace(run, model=tmp_path / "model", metrics=("clip",)))
