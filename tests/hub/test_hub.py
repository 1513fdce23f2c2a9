"""Models to and from the Hub: cards, parts alone, paths before ids, errors in sentences. The Hub is
hub_server.py.

The client is huggingface_hub itself. Nothing here asks the Hub of the world.
"""

import json
import re
import runpy
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from dalle.commands.push_model import PushModelArgs, push_model
from dalle.commands.sample import SampleArgs, sample
from dalle.hub.model_card import flatten
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.files import read_json, write_json
from dalle.pipelines.dalle import DALLE
from tests.helpers.hub_server import READ_ONLY, TOKEN, Hub, running

NAME = "someone/shapes"
SCRIPTS = Path(__file__).parents[2] / "scripts"
KINDS = ("dvae", "transformer", "clip")


def drawn(model: DALLE, prompt: str) -> list[list[int]]:
    return model.generate(prompt, n=2, best_of=3, seed=4, progress=False).image_tokens.tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A Hub of this test, that huggingface_hub asks; nobody is logged in, the cache is empty."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    constants = huggingface_hub.constants
    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the network fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)


# ---------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------


class TestCard:
    def test_what_is_given_is_told(self, dalle, tmp_path):
        report = {"accuracy": {"first": 0.93512, "best|of": 1}, "steps": 12000, "whole": True, "grid": [4, 4]}
        dalle.save_pretrained(tmp_path, report | {"model": dalle.hash, "left_out": None}, license="cc-by-4.0")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.to_dict() == {
            "license": "cc-by-4.0",
            "library_name": "zeroshot-text2image",
            "pipeline_tag": "text-to-image",
            "tags": ["dalle", "text-to-image"],
        }
        rows = re.findall(r"^\| (.+) \| (.+) \|$", card.text.split("## Training")[1], re.MULTILINE)
        assert rows[2:] == [
            ("accuracy.first", "0.9351"),
            ("accuracy.best\\|of", "1"),
            ("steps", "12,000"),
            ("whole", "yes"),
            ("grid", "(4, 4)"),
        ]
        assert card.text.split("## Licence")[1].strip() == "cc-by-4.0"

    def test_what_is_not_given_is_not_made_up(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "license" not in card.data.to_dict()
        assert "None is given" in card.text.split("## Licence")[1]
        assert "No report was given" in card.text
        assert "| figure |" not in card.text

    def test_parameters_are_counted_in_the_files(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path)
        rows = re.findall(
            r"^\| (\w+) \| ([\d,]+) \| `(\w+)` \|$", (tmp_path / "README.md").read_text(), re.MULTILINE
        )
        models = {"dvae": dalle.dvae, "transformer": dalle.transformer, "clip": dalle.scorer.model}
        count = {kind: sum(t.numel() for t in model.state_dict().values()) for kind, model in models.items()}
        assert rows == [
            (kind, f"{count[kind]:,}", hashed)
            for kind, hashed in zip(KINDS, dalle.hash.split("-"), strict=True)
        ]

    def test_the_example_of_the_card_draws(self, dalle, tmp_path, monkeypatch):
        dalle.save_pretrained(tmp_path / "path/of/this/folder")
        monkeypatch.chdir(tmp_path)
        text = (tmp_path / "path/of/this/folder/README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        found: dict = {}
        exec(code.replace("n=4, best_of=16", "n=1, best_of=1, progress=False"), found)
        assert found["model"].hash == dalle.hash

    def test_without_a_scorer_the_example_ranks_nothing(self, dalle, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path)
        assert "best_of=4)" in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_example_of_a_part_opens_it(self, chain, tmp_path, monkeypatch, kind):
        part = load_model(chain / kind, kind)
        part.save_pretrained(tmp_path / "path/of/this/folder")
        monkeypatch.chdir(tmp_path)
        text = (tmp_path / "path/of/this/folder/README.md").read_text()
        found: dict = {}
        exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], found)
        assert type(found["model"]) is type(part.model)
        dvae = part.links["dvae"] if kind == "transformer" else None
        assert ("those of the dVAE" in text, dvae is None or dvae in text) == (kind == "transformer", True)

    def test_an_empty_licence_is_none(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path, license="")
        assert "license" not in ModelCard.load(tmp_path / "README.md").data.to_dict()

    def test_a_report_may_be_a_file(self, dalle, tmp_path):
        write_json(tmp_path / "report.json", {"loss": 3.25})
        dalle.save_pretrained(tmp_path / "model", report=tmp_path / "report.json")
        assert "| loss | 3.25 |" in (tmp_path / "model" / "README.md").read_text()

    @pytest.mark.parametrize(
        ("content", "said"),
        [(None, "no report .*; give the report.json"), ("[1]", "is no report"), ("{", "is not JSON")],
    )
    def test_a_report_that_is_none_is_refused_before_anything_is_written(
        self, dalle, tmp_path, content, said
    ):
        if content:
            (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            dalle.save_pretrained(tmp_path / "model", report=tmp_path / "report.json")
        assert not (tmp_path / "model").exists()

    def test_figures_of_another_model_are_refused(self, dalle, tmp_path):
        with pytest.raises(ValueError, match="the report is of the model 0-1-2, the weights here are"):
            dalle.save_pretrained(tmp_path / "model", report={"model": "0-1-2", "loss": 1.0})
        assert not (tmp_path / "model").exists()

    def test_a_part_takes_the_report_of_the_whole(self, chain, dalle, tmp_path):
        load_model(chain / "dvae", "dvae").save_pretrained(
            tmp_path, report={"model": dalle.hash, "loss": 1.5}
        )
        assert "| loss | 1.5 |" in (tmp_path / "README.md").read_text()

    def test_long_values_are_cut_and_lines_stay_lines(self):
        assert list(
            flatten({"a": {"b": list(range(20))}, "c": "x\ny | z", "d": 123456.7, "model": "hash"})
        ) == [
            ("a.b", "(0, 1, 2, 3, 4, 5, 6, 7, ...)"),
            ("c", "x y \\| z"),
            ("d", "123,457"),
        ]

    def test_a_licence_cannot_write_other_lines_of_the_front_matter(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path, license="mit\ntags: [evil]")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.tags == ["dalle", "text-to-image"]

    def test_quotes_and_braces_of_a_report_are_text(self, dalle, tmp_path):
        dalle.save_pretrained(tmp_path, report={"note": "{{ 1 + 1 }} <b>'\""})
        assert "| note | {{ 1 + 1 }} <b>'\" |" in (tmp_path / "README.md").read_text()


# ---------------------------------------------------------------------------------------------
# Parts alone
# ---------------------------------------------------------------------------------------------


class TestParts:
    def test_saved_one_by_one_they_join_to_the_same_model(self, chain, dalle, prompt, tmp_path):
        for kind in KINDS:
            load_model(chain / kind, kind).save_pretrained(tmp_path / kind)
        model = DALLE.from_parts(*(LoadedModel.from_pretrained(tmp_path / kind) for kind in KINDS))
        assert model.hash == dalle.hash
        assert drawn(model, prompt) == drawn(dalle, prompt)

    def test_each_brings_what_it_needs(self, chain, tmp_path):
        for kind in KINDS:
            load_model(chain / kind, kind).save_pretrained(tmp_path / kind)
            text = ["text_tokenizer.json"] if kind != "dvae" else []
            assert sorted(contents(tmp_path / kind)) == sorted(
                ["README.md", "config.json", f"{kind}.safetensors", *text]
            )

    def test_a_model_of_ones_own_is_a_part_too(self, dalle, tmp_path):
        LoadedModel("dvae", dalle.dvae).save_pretrained(tmp_path)
        assert LoadedModel.from_pretrained(tmp_path).hash == dalle.hash.split("-")[0]

    def test_without_its_text_tokenizer_a_transformer_joins_nothing(self, dalle, tmp_path):
        LoadedModel("transformer", dalle.transformer).save_pretrained(tmp_path)
        alone = LoadedModel.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="dvae and text"):
            DALLE.from_parts(LoadedModel("dvae", dalle.dvae), alone, None)

    def test_of_several_parts_one_must_be_named(self, chain):
        with pytest.raises(ValueError, match="holds dvae, transformer, clip; say which as kind"):
            LoadedModel.from_pretrained(chain / "model")
        assert LoadedModel.from_pretrained(chain / "model", "clip").kind == "clip"
        with pytest.raises(ValueError, match="kind must be one of dvae, transformer, clip, got 'vae'"):
            LoadedModel.from_pretrained(chain / "model", "vae")

    def test_a_run_is_a_source_too(self, chain):
        assert LoadedModel.from_pretrained(chain / "dvae").hash == load_model(chain / "dvae", "dvae").hash

    def test_a_part_is_no_whole(self, chain, tmp_path):
        load_model(chain / "dvae", "dvae").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="holds no transformer; it has dvae"):
            DALLE.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------
# Paths before ids
# ---------------------------------------------------------------------------------------------


class TestPaths:
    def test_a_path_asks_no_network(self, chain, dalle, prompt, offline):
        assert drawn(DALLE.from_pretrained(str(chain / "model")), prompt) == drawn(dalle, prompt)
        assert LoadedModel.from_pretrained(chain / "model", "dvae").kind == "dvae"

    def test_the_guard_of_that_test_sees_a_download(self, offline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(AssertionError, match="the network was asked"):
            DALLE.from_pretrained(NAME)

    def test_a_folder_named_as_an_id_wins(self, chain, dalle, hub, tmp_path, monkeypatch):
        shutil.copytree(chain / "model", tmp_path / NAME)
        monkeypatch.chdir(tmp_path)
        assert DALLE.from_pretrained(NAME).hash == dalle.hash
        assert hub.asked == []
        with pytest.raises(ValueError, match="is a path here, which has no revision 'v1'"):
            DALLE.from_pretrained(NAME, revision="v1")

    @pytest.mark.parametrize(
        "wrong", ["model", "./some/model", "a/b/c", "/no/where", "~/model", "some..one/model", ""]
    )
    def test_what_is_neither_is_refused_without_asking(self, wrong, offline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="is no model directory"):
            DALLE.from_pretrained(wrong)

    def test_a_slip_in_a_folder_that_exists_is_no_id(self, offline, tmp_path, monkeypatch):
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ValueError, match=r"runs/modell is no model directory: .* runs, which is a folder here"
        ):
            DALLE.from_pretrained("runs/modell")


# ---------------------------------------------------------------------------------------------
# From the Hub
# ---------------------------------------------------------------------------------------------


def downloads(hub: Hub) -> set[str]:
    """Files whose content was asked for."""
    return {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}


@pytest.fixture
def published(hub: Hub, chain: Path) -> Hub:
    """The Hub with the model of `chain` on it, and files beside it that nobody needs."""
    hub.repos[NAME] = {
        "main": contents(chain / "model") | {"optimizer.safetensors": b"", "pytorch_model.bin": b"x"}
    }
    return hub


class TestDownload:
    def test_the_whole_draws_the_same(self, published, dalle, prompt):
        model = DALLE.from_pretrained(NAME)
        assert model.hash == dalle.hash
        assert drawn(model, prompt) == drawn(dalle, prompt)
        assert downloads(published) == {
            "config.json",
            "text_tokenizer.json",
            *(f"{kind}.safetensors" for kind in KINDS),
        }

    def test_of_a_part_no_more_comes_than_it_needs(self, published, chain):
        part = LoadedModel.from_pretrained(NAME, "dvae")
        assert part.hash == load_model(chain / "dvae", "dvae").hash
        assert downloads(published) == {"config.json", "text_tokenizer.json", "dvae.safetensors"}

    def test_a_part_that_must_be_named_costs_its_config_only(self, published):
        with pytest.raises(ValueError, match="say which as kind"):
            LoadedModel.from_pretrained(NAME)
        assert downloads(published) == {"config.json"}

    def test_a_second_time_it_comes_from_the_cache_without_a_network(self, published, dalle, monkeypatch):
        DALLE.from_pretrained(NAME)
        asked = len(published.asked)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert DALLE.from_pretrained(NAME).hash == dalle.hash
        assert len(published.asked) == asked

    def test_a_revision_is_passed_on(self, published, dalle):
        published.repos[NAME]["raw"] = {"config.json": b"{}"}
        with pytest.raises(ValueError, match="holds 'something unknown', expected 'dalle'"):
            DALLE.from_pretrained(NAME, revision="raw")
        assert DALLE.from_pretrained(NAME, revision="main").hash == dalle.hash

    def test_a_token_opens_a_private_repository(self, published, dalle):
        published.hidden[NAME] = "RepoNotFound"
        assert DALLE.from_pretrained(NAME, token=TOKEN).hash == dalle.hash

    @pytest.mark.parametrize(
        ("change", "options", "said"),
        [
            (lambda hub: hub.repos.clear(), {}, "the Hub has no such repository, or it is private"),
            (
                lambda hub: hub.hidden.update({NAME: "RepoNotFound"}),
                {},
                "private and your token may not.*hf auth",
            ),
            (
                lambda hub: hub.hidden.update({NAME: "GatedRepo"}),
                {},
                "open only to those whom its owner lets in",
            ),
            (lambda hub: None, {"revision": "v9"}, "has no revision 'v9'"),
            (
                lambda hub: None,
                {"token": True},
                "token=True asks for the token of a login, and there is none",
            ),
            (lambda hub: hub.repos[NAME]["main"].pop("config.json"), {}, "on the Hub has no config.json"),
            (lambda hub: hub.repos[NAME]["main"].pop("text_tokenizer.json"), {}, "text_tokenizer.json"),
            (lambda hub: hub.repos[NAME]["main"].pop("dvae.safetensors"), {}, "no file .*dvae.safetensors"),
        ],
    )
    def test_what_fails_is_told(self, published, change, options, said):
        change(published)
        with pytest.raises(ValueError, match=said) as caught:
            DALLE.from_pretrained(NAME, **options)
        assert "\n" not in str(caught.value)

    def test_sample_draws_with_an_id(self, published, dalle, prompt, tmp_path):
        run = SampleArgs(
            prompt, model=Path(NAME), best_of=3, num_images=2, seed=4, device="cpu", out=tmp_path / "out"
        )
        assert read_json(sample(run) / "sample.json")["model"] == dalle.hash

    def test_a_later_format_is_told(self, published):
        files = published.repos[NAME]["main"]
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"format": 99}).encode()
        with pytest.raises(ValueError, match=r"has format 99.* update the library"):
            DALLE.from_pretrained(NAME)

    def test_offline_and_not_cached_is_told(self, published, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            ValueError, match="not whole in the cache of the Hub, and the Hub cannot be reached"
        ):
            DALLE.from_pretrained(NAME)
        assert published.asked == []

    def test_offline_with_half_of_it_cached_is_told(self, published, monkeypatch):
        LoadedModel.from_pretrained(NAME, "dvae")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="not whole in the cache of the Hub"):
            DALLE.from_pretrained(NAME)

    def test_a_hub_that_is_down_is_told(self, hub, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(ValueError, match="the Hub cannot be reached"):
            DALLE.from_pretrained(NAME)


# ---------------------------------------------------------------------------------------------
# To the Hub
# ---------------------------------------------------------------------------------------------


class TestPush:
    def test_what_was_pushed_draws_the_same(self, hub, dalle, prompt):
        url = dalle.push_to_hub(NAME, report={"loss": 2.5}, license="mit", token=TOKEN)
        assert url.startswith(f"{hub.url}/{NAME}/commit/")
        assert sorted(hub.repos[NAME]["main"]) == sorted(
            ["README.md", "config.json", "text_tokenizer.json", *(f"{kind}.safetensors" for kind in KINDS)]
        )
        assert drawn(DALLE.from_pretrained(NAME), prompt) == drawn(dalle, prompt)

    def test_the_card_tells_the_id(self, hub, dalle):
        dalle.push_to_hub(NAME, license="mit", token=TOKEN)
        card = ModelCard(hub.repos[NAME]["main"]["README.md"].decode())
        assert (card.data.license, f'from_pretrained("{NAME}")' in card.text) == ("mit", True)
        assert "path/of/this/folder" not in card.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_part_goes_alone(self, hub, chain, kind):
        part = load_model(chain / kind, kind)
        part.push_to_hub(NAME, token=TOKEN)
        again = LoadedModel.from_pretrained(NAME)
        assert (again.kind, again.hash) == (kind, part.hash)
        kept = {name: part.links[name] for name in ("text", "text_hash", "dvae") if name in part.links}
        assert again.links == kept | ({"dvae": part.hash} if kind == "dvae" else {})

    def test_the_token_of_a_login_is_used(self, hub, dalle, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        dalle.push_to_hub(NAME, private=True)
        assert hub.hidden == {NAME: "RepoNotFound"}
        assert DALLE.from_pretrained(NAME).hash == dalle.hash

    def test_a_private_push_to_a_public_repository_is_refused(self, hub, dalle):
        hub.repos[NAME] = {"main": {}}
        with pytest.raises(ValueError, match="is there already and is public; make it private"):
            dalle.push_to_hub(NAME, private=True, token=TOKEN)
        assert hub.repos[NAME] == {"main": {}}

    def test_a_branch_is_made(self, hub, dalle):
        dalle.push_to_hub(NAME, revision="v2", token=TOKEN)
        assert hub.repos[NAME]["main"] == {}
        assert DALLE.from_pretrained(NAME, revision="v2").hash == dalle.hash

    def test_without_a_login_nothing_is_asked(self, hub, dalle):
        for token in (None, False, True):
            with pytest.raises(
                ValueError, match=f"to push to {NAME} you need an account of the Hub and a token"
            ):
                dalle.push_to_hub(NAME, token=token)
        assert hub.asked == []

    @pytest.mark.parametrize("wrong", ["shapes", "a/b/c", "some..one/shapes", ""])
    def test_an_id_that_cannot_be_is_told(self, hub, dalle, wrong):
        with pytest.raises(ValueError, match="expected the id of a repository of the Hub, owner/name"):
            dalle.push_to_hub(wrong, token=TOKEN)
        assert hub.asked == []

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"token": READ_ONLY}, "the Hub does not let your token do this to someone/shapes"),
            ({"token": "hf_wrong"}, "does not let your token do this"),
            (
                {"token": TOKEN, "license": "no-such"},
                'Invalid metadata in README.md. - "license" must be one of',
            ),
        ],
    )
    def test_what_the_hub_refuses_is_told(self, hub, dalle, options, said):
        with pytest.raises(ValueError, match=said) as caught:
            dalle.push_to_hub(NAME, **options)
        assert "\n" not in str(caught.value)
        assert hub.repos.get(NAME, {"main": {}}) == {"main": {}}

    def test_a_hub_that_is_down_is_told(self, hub, dalle, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(ValueError, match="the Hub cannot be reached, or broke off"):
            dalle.push_to_hub(NAME, token=TOKEN)


# ---------------------------------------------------------------------------------------------
# scripts/push_model.py
# ---------------------------------------------------------------------------------------------


class TestPushModel:
    def test_a_dry_run_tells_and_asks_nothing(self, chain, offline, capsys):
        assert push_model(PushModelArgs(chain / "model", to=NAME, license="mit", dry_run=True)) is None
        said = capsys.readouterr().out
        size = (chain / "model" / "clip.safetensors").stat().st_size
        assert f"would go to {NAME}:" in said
        assert f"{size:,} bytes  clip.safetensors" in said
        card = ModelCard(said.split("README.md:\n\n")[1].split("Nothing was uploaded.")[0])
        assert card.data.license == "mit"
        assert f'from_pretrained("{NAME}")' in card.text

    def test_a_card_of_ones_own_goes_as_it_lies(self, chain, hub, tmp_path, monkeypatch):
        shutil.copytree(chain / "model", tmp_path / "model")
        (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
        (tmp_path / "model" / "diary.txt").write_text("private")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push_model(PushModelArgs(tmp_path / "model", to=NAME))
        assert hub.repos[NAME]["main"]["README.md"] == b"---\nlicense: mit\n---\nMy own words.\n"
        assert "diary.txt" not in hub.repos[NAME]["main"]

    def test_a_report_makes_a_card_and_leaves_the_directory_alone(self, chain, hub, tmp_path, monkeypatch):
        before = contents(chain / "model")
        write_json(tmp_path / "report.json", {"loss": 1.25})
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push_model(PushModelArgs(chain / "model", to=NAME, report=tmp_path / "report.json"))
        assert b"| loss | 1.25 |" in hub.repos[NAME]["main"]["README.md"]
        assert contents(chain / "model") == before

    def test_a_run_goes_as_its_part(self, chain, hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        push_model(PushModelArgs(chain / "transformer", to=NAME))
        assert LoadedModel.from_pretrained(NAME).hash == load_model(chain / "transformer", "transformer").hash

    @pytest.mark.parametrize(
        ("run", "said"),
        [
            (PushModelArgs(), "give a model directory: python scripts/push_model.py DIRECTORY"),
            (PushModelArgs(Path("nowhere"), to=NAME), "no directory nowhere"),
            (PushModelArgs(Path(), to=""), "expected the id of a repository of the Hub, owner/name"),
            (PushModelArgs(Path(), to=NAME), "you need an account of the Hub"),
            (PushModelArgs(Path(), dry_run=True), "expected a run or model directory"),
        ],
    )
    def test_mistakes_are_told(self, hub, run, said, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=said):
            push_model(run)
        assert hub.asked == []

    def test_a_directory_without_a_file_is_told(self, chain, tmp_path):
        shutil.copytree(chain / "model", tmp_path / "model")
        (tmp_path / "model" / "text_tokenizer.json").unlink()
        with pytest.raises(
            ValueError, match=r"no file .*text_tokenizer\.json; the model directory is incomplete"
        ):
            push_model(PushModelArgs(tmp_path / "model", dry_run=True))

    def test_the_script_with_the_switches_of_huggingface_hub(
        self, chain, dalle, hub, python, tmp_path, monkeypatch
    ):
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": tmp_path / "home"}.items():
            monkeypatch.setenv(name, str(value))
        done = python(
            ["scripts/push_model.py", chain / "model", "--to", NAME, "--license", "mit"], cwd=tmp_path
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert f"is at {hub.url}/{NAME}/commit/" in done.stdout
        assert DALLE.from_pretrained(NAME).hash == dalle.hash

    def test_the_script_ends_with_a_sentence(self, chain, hub, monkeypatch):
        monkeypatch.setattr("sys.argv", ["push_model.py", str(chain / "model"), "--to", NAME])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPTS / "push_model.py"), run_name="__main__")
        assert str(stop.value).startswith(f"error: to push to {NAME} you need an account of the Hub")
        assert hub.asked == []
