"""Models to and from a local Hub: model cards, single parts, paths before ids, errors."""

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from dalle.commands.sample import SampleArgs, sample
from dalle.hub.model_card import metric_rows
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import read_json, write_json
from dalle.pipelines.dalle import DALLE
from tests.helpers.hub_server import READ_ONLY, TOKEN, Hub

NAME = "someone/shapes"
KINDS = ("dvae", "transformer", "clip")
FILES = ["README.md", "config.json", "text_tokenizer.json", *(f"{kind}.safetensors" for kind in KINDS)]


def sampled(model: DALLE, prompt: str) -> list[list[int]]:
    return model.generate(prompt, n=2, best_of=3, seed=4, progress=False).image_tokens.tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def example(folder: Path) -> str:
    """The Python code of a model card."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]


class TestCard:
    def test_metrics_license_and_parameters(self, dalle, tmp_path):
        report = {"accuracy": {"first": 0.93512, "best|of": 1}, "steps": 12000, "whole": True, "grid": [4, 4]}
        report["note"] = "{{ 1 + 1 }} <b>'\""
        dalle.save_pretrained(tmp_path, report | {"model": dalle.hash, "left_out": None}, license="cc-by-4.0")
        card = ModelCard.load(tmp_path / "README.md")
        expected = {"library_name": "zeroshot-text2image", "pipeline_tag": "text-to-image"}
        assert card.data.to_dict() == expected | {"license": "cc-by-4.0", "tags": ["dalle", "text-to-image"]}
        rows = re.findall(r"^\| (.+) \| (.+) \|$", card.text.split("## Training")[1], re.MULTILINE)
        expected = {"accuracy.first": "0.9351", "accuracy.best\\|of": "1", "steps": "12,000", "whole": "yes"}
        assert dict(rows[2:]) == expected | {"grid": "(4, 4)", "note": "{{ 1 + 1 }} <b>'\""}
        assert card.text.split("## License")[1].strip() == "cc-by-4.0"
        rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| `(\w+)` \|$", card.text, re.MULTILINE)
        models = (dalle.dvae, dalle.transformer, dalle.scorer.model)
        counts = [f"{sum(t.numel() for t in model.state_dict().values()):,}" for model in models]
        assert rows == list(zip(KINDS, counts, dalle.hash.split("-"), strict=True))

    def test_without_report_and_license(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "license" not in card.data.to_dict()
        assert "None is given" in card.text.split("## License")[1]
        assert "No report was given" in card.text
        assert "| metric |" not in card.text
        dalle.save_pretrained(tmp_path, license="mit\ntags: [evil]")
        assert ModelCard.load(tmp_path / "README.md").data.tags == ["dalle", "text-to-image"]

    def test_the_example_runs(self, dalle, tmp_path, monkeypatch):
        dalle.save_pretrained(tmp_path / "path/of/this/folder")
        monkeypatch.chdir(tmp_path)
        code, found = example(tmp_path / "path/of/this/folder"), {}
        exec(code.replace("n=4, best_of=16", "n=1, best_of=1, progress=False"), found)
        assert found["model"].hash == dalle.hash
        dalle.scorer = None
        dalle.save_pretrained(tmp_path)
        assert "best_of=4)" in example(tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_example_of_a_part_runs(self, chain, tmp_path, monkeypatch, kind):
        part = load_model(chain / kind, kind)
        part.save_pretrained(tmp_path / "path/of/this/folder")
        monkeypatch.chdir(tmp_path)
        found: dict = {}
        exec(example(tmp_path / "path/of/this/folder"), found)
        assert type(found["model"]) is type(part.model)
        text = (tmp_path / "path/of/this/folder/README.md").read_text()
        assert (f"those of the dVAE `{part.inputs.get('dvae')}`" in text) == (kind == "transformer")

    @pytest.mark.parametrize(
        ("content", "message"), [(None, "no report"), ("[1]", "damaged"), ("{", "not JSON")]
    )
    def test_a_report_file(self, dalle, tmp_path, content, message):
        report, model = tmp_path / "report.json", tmp_path / "model"
        if content:
            report.write_text(content)
        with pytest.raises(ValueError, match=message):
            dalle.save_pretrained(model, report=report)
        with pytest.raises(ValueError, match="of the model 0-1-2"):
            dalle.save_pretrained(model, report={"model": "0-1-2", "loss": 1.0})
        assert not model.exists()
        write_json(report, {"loss": 3.25, "model": dalle.hash})
        LoadedModel("dvae", dalle.dvae).save_pretrained(model, report=report)  # a part of the model measured
        assert "| loss | 3.25 |" in (model / "README.md").read_text()

    def test_long_values_are_cut_and_lines_stay_lines(self):
        rows = metric_rows({"a": {"b": list(range(20))}, "c": "x\ny | z", "d": 123456.7, "model": "hash"})
        numbers = "(0, 1, 2, 3, 4, 5, 6, 7, ...)"
        assert rows == [("a.b", numbers), ("c", "x y \\| z"), ("d", "123,457")]


class TestParts:
    def test_parts_saved_one_by_one_join_to_the_same_model(self, chain, dalle, prompt, tmp_path):
        for kind in KINDS:
            load_model(chain / kind, kind).save_pretrained(tmp_path / kind)
            text = ["text_tokenizer.json"] if kind != "dvae" else []
            files = ["README.md", "config.json", f"{kind}.safetensors", *text]
            assert sorted(contents(tmp_path / kind)) == sorted(files)
            inputs = load_model(chain / kind, kind).inputs
            kept = {name: inputs[name] for name in ("text", "text_hash", "dvae") if name in inputs}
            saved = LoadedModel.from_pretrained(tmp_path / kind)
            assert saved.inputs == kept | ({"dvae": saved.hash} if kind == "dvae" else {})
        model = DALLE.from_parts(*(LoadedModel.from_pretrained(tmp_path / kind) for kind in KINDS))
        assert model.hash == dalle.hash
        assert sampled(model, prompt) == sampled(dalle, prompt)
        with pytest.raises(ValueError, match="holds no transformer; it has dvae"):
            DALLE.from_pretrained(tmp_path / "dvae")

    def test_a_model_without_a_checkpoint(self, dalle, tmp_path):
        LoadedModel("dvae", dalle.dvae).save_pretrained(tmp_path / "dvae")
        dvae = LoadedModel.from_pretrained(tmp_path / "dvae")
        assert dvae.hash == dalle.hash.split("-")[0]
        LoadedModel("transformer", dalle.transformer).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="dvae and text"):  # it does not name its text tokenizer
            DALLE.from_parts(dvae, LoadedModel.from_pretrained(tmp_path), None)

    def test_of_several_parts_the_kind_must_be_given(self, chain):
        with pytest.raises(ValueError, match="give kind"):
            LoadedModel.from_pretrained(chain / "model")
        assert LoadedModel.from_pretrained(chain / "model", "clip").kind == "clip"
        with pytest.raises(ValueError, match=r"kind .* got 'vae'"):
            LoadedModel.from_pretrained(chain / "model", "vae")
        assert LoadedModel.from_pretrained(chain / "dvae").hash == load_model(chain / "dvae", "dvae").hash


class TestPaths:
    def test_a_path_uses_no_network(self, chain, dalle, prompt, offline, tmp_path, monkeypatch):
        assert sampled(DALLE.from_pretrained(str(chain / "model")), prompt) == sampled(dalle, prompt)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(AssertionError, match="the network was used"):
            DALLE.from_pretrained(NAME)

    def test_a_directory_is_preferred_to_an_id(self, chain, dalle, hub, tmp_path, monkeypatch):
        shutil.copytree(chain / "model", tmp_path / NAME)
        monkeypatch.chdir(tmp_path)
        assert DALLE.from_pretrained(NAME).hash == dalle.hash
        assert hub.asked == []
        with pytest.raises(ValueError, match="no revision 'v1'"):
            DALLE.from_pretrained(NAME, revision="v1")

    WRONG = ("model", "./a/model", "a/b/c", "/no/where", "~/model", "a..b/model", "", "runs/modell", "a.md/x")

    @pytest.mark.parametrize("wrong", [*WRONG, "a/b.safetensors", Path("./owner/name")])
    def test_neither_a_path_nor_an_id(self, wrong, offline, tmp_path, monkeypatch):
        (tmp_path / "runs").mkdir()  # a typo in a directory that exists is no id
        (tmp_path / "a.md").touch()  # nor a name below a file
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="is no model directory"):
            DALLE.from_pretrained(wrong)


def downloads(hub: Hub) -> set[str]:
    """Files whose content was requested."""
    return {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}


@pytest.fixture
def published(hub: Hub, chain: Path) -> Hub:
    """The Hub with the model of `chain` on it, and files that nobody needs."""
    other = {"optimizer.safetensors": b"", "pytorch_model.bin": b"x"}
    hub.repos[NAME] = {"main": contents(chain / "model") | other}
    return hub


class TestDownload:
    def test_a_whole_model_then_from_the_cache(self, published, dalle, prompt, monkeypatch):
        model = DALLE.from_pretrained(NAME)
        assert model.hash == dalle.hash
        assert sampled(model, prompt) == sampled(dalle, prompt)
        assert downloads(published) == set(FILES) - {"README.md"}
        requests = len(published.asked)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert DALLE.from_pretrained(NAME).hash == dalle.hash
        assert len(published.asked) == requests

    def test_a_part_downloads_its_files_only(self, published, chain, monkeypatch):
        with pytest.raises(ValueError, match="give kind"):
            LoadedModel.from_pretrained(NAME)
        assert downloads(published) == {"config.json", "text_tokenizer.json"}
        part = LoadedModel.from_pretrained(NAME, "dvae")
        assert part.hash == load_model(chain / "dvae", "dvae").hash
        assert downloads(published) == {"config.json", "text_tokenizer.json", "dvae.safetensors"}
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=NAME):  # the other parts are not in the cache
            DALLE.from_pretrained(NAME)

    def test_a_revision_and_a_token_are_passed_on(self, published, dalle):
        published.repos[NAME]["raw"] = {"config.json": b"{}"}
        with pytest.raises(ValueError, match="expected 'dalle'"):
            DALLE.from_pretrained(NAME, revision="raw")
        published.hidden[NAME] = "RepoNotFound"
        assert DALLE.from_pretrained(NAME, token=TOKEN, revision="main").hash == dalle.hash

    @pytest.mark.parametrize(
        ("change", "options", "message"),
        [
            (lambda hub: hub.repos.clear(), {}, "Repository Not Found"),
            (lambda hub: hub.hidden.update({NAME: "RepoNotFound"}), {}, "make sure you are authenticated"),
            (lambda hub: hub.hidden.update({NAME: "GatedRepo"}), {}, "gated repo"),
            (lambda hub: None, {"revision": "v9"}, "Revision Not Found"),
            (lambda hub: None, {"token": True}, "no token found"),
            (lambda hub: hub.repos[NAME]["main"].pop("config.json"), {}, "on the Hub has no config.json"),
            (lambda hub: hub.repos[NAME]["main"].pop("text_tokenizer.json"), {}, "text_tokenizer.json"),
            (lambda hub: hub.repos[NAME]["main"].pop("dvae.safetensors"), {}, "no file .*dvae.safetensors"),
        ],
    )
    def test_errors_are_one_line(self, published, change, options, message):
        change(published)
        with pytest.raises(ValueError, match=message) as caught:
            DALLE.from_pretrained(NAME, **options)
        assert "\n" not in str(caught.value)

    def test_sample_with_an_id(self, published, dalle, prompt, tmp_path):
        options = {"best_of": 3, "num_images": 2, "seed": 4, "device": "cpu", "out": tmp_path / "out"}
        run = SampleArgs(prompt, model=Path(NAME), **options)
        assert read_json(sample(run) / "sample.json")["model"] == dalle.hash

    def test_an_unreachable_hub(self, published, dalle, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=f"{NAME} on the Hub: .*local disk"):
            DALLE.from_pretrained(NAME)
        assert published.asked == []
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(ValueError, match=f"{NAME} on the Hub: .*connection"):
            DALLE.from_pretrained(NAME)
        with pytest.raises(ValueError, match=f"{NAME} on the Hub"):
            dalle.push_to_hub(NAME, token=TOKEN)


class TestPush:
    def test_a_whole_model(self, hub, dalle, prompt):
        url = dalle.push_to_hub(NAME, report={"loss": 2.5}, license="mit", token=TOKEN)
        assert url.startswith(f"{hub.url}/{NAME}/commit/")
        assert sorted(hub.repos[NAME]["main"]) == sorted(FILES)
        assert sampled(DALLE.from_pretrained(NAME), prompt) == sampled(dalle, prompt)
        card = ModelCard(hub.repos[NAME]["main"]["README.md"].decode())
        assert card.data.license == "mit"
        assert f'from_pretrained("{NAME}")' in card.text
        assert "path/of/this/folder" not in card.text

    def test_a_private_repository_with_the_token_of_the_login(self, hub, dalle, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        dalle.push_to_hub(NAME, private=True)
        assert hub.hidden == {NAME: "RepoNotFound"}
        assert DALLE.from_pretrained(NAME).hash == dalle.hash
        hub.repos["someone/public"] = {"main": {}}
        with pytest.raises(ValueError, match="exists and is public"):
            dalle.push_to_hub("someone/public", private=True, token=TOKEN)
        assert hub.repos["someone/public"] == {"main": {}}

    def test_a_branch_is_created(self, hub, dalle):
        dalle.push_to_hub(NAME, revision="v2", token=TOKEN)
        assert hub.repos[NAME]["main"] == {}
        assert DALLE.from_pretrained(NAME, revision="v2").hash == dalle.hash

    @pytest.mark.parametrize(
        ("repo_id", "token", "message"),
        [
            *((NAME, token, "needs a token") for token in (None, False, True)),
            *((name, TOKEN, "owner/name") for name in ("shapes", "a/b/c", "some..one/shapes", "")),
        ],
    )
    def test_mistakes_are_found_before_a_request(self, hub, dalle, repo_id, token, message):
        with pytest.raises(ValueError, match=message):
            dalle.push_to_hub(repo_id, token=token)
        assert hub.asked == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"token": READ_ONLY}, "403"),
            ({"token": "hf_wrong"}, "401"),
            ({"token": TOKEN, "license": "no-such"}, '"license" must be one'),
        ],
    )
    def test_refusals_of_the_hub(self, hub, dalle, options, message):
        with pytest.raises(ValueError, match=message) as caught:
            dalle.push_to_hub(NAME, **options)
        assert "\n" not in str(caught.value)
        assert hub.repos.get(NAME, {"main": {}}) == {"main": {}}
