"""The sample command: what it writes; external files: a transformer with its models, a CLIP to rank."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle.commands.sample import SampleArgs, new_directory, sample
from dalle.io.files import read_json
from dalle.pipelines.dalle import DALLE
from dalle.sampling import SamplingConfig
from tests.helpers.dalle_pytorch_reference import TOKENIZER, make_file, make_weights
from tests.helpers.external import OPENAI_CLIP, open_clip_weights
from tests.helpers.refusals import assert_refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dalle.pt, tokenizer.json, clip.pt of open_clip, openai.pt of OpenAI."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(make_file(make_weights(depth=1), depth=1), folder / "dalle.pt")
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"added_tokens": []}))
    torch.save(open_clip_weights(), folder / "clip.pt")
    torch.save(open_clip_weights() | OPENAI_CLIP, folder / "openai.pt")
    return folder


@pytest.fixture
def external(files: Path, tmp_path: Path) -> dict:
    """Fields of SampleArgs for the external transformer."""
    options = {"prompt": "a b", "model": files / "dalle.pt", "text_tokenizer": files / "tokenizer.json"}
    options |= {"device": "cpu", "best_of": 2, "num_images": 1, "sampling": SamplingConfig(batch_size=2)}
    return options | {"out": tmp_path / "out"}


def test_an_external_transformer_is_sampled_and_ranked(files: Path, external: dict) -> None:
    out = sample(SampleArgs(**external, clip=files / "openai.pt"))
    record = json.loads((out / "sample.json").read_text())
    assert (out / "00.png").is_file()
    assert (record["best_of"], len(record["images"])) == (2, 1)
    assert -1 <= record["images"][0]["score"] <= 1


def test_a_file_of_prompts_resumes_with_the_same_clip_only(
    files: Path, external: dict, tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("a b\nb a\n")
    external |= {"prompt": "", "prompts_file": tmp_path / "captions.txt", "quick_gelu": True}
    for _ in range(2):
        out = sample(SampleArgs(**external, clip=files / "clip.pt"))
    assert len(list(out.rglob("*.png"))) >= 2
    changed = torch.load(files / "clip.pt", weights_only=True)
    changed["text_projection"] = changed["text_projection"] + 1
    torch.save(changed, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="clip"):
        sample(SampleArgs(**external, clip=tmp_path / "other.pt"))


def test_an_external_clip_ranks_our_own_images(files: Path, chain: Path, prompt: str, tmp_path: Path) -> None:
    scores = []
    for name, quick_gelu in (("openai.pt", None), ("clip.pt", True), ("clip.pt", False)):
        options = {"dvae": chain / "dvae", "transformer": chain / "transformer", "clip": files / name}
        options |= {"out": tmp_path / f"{name}-{quick_gelu}", "quick_gelu": quick_gelu, "device": "cpu"}
        out = sample(SampleArgs(prompt=prompt, best_of=2, num_images=1, **options))
        scores.append(json.loads((out / "sample.json").read_text())["images"][0]["score"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_tokenizer", None, "give --text-tokenizer"),
        ("transformer", Path("runs/transformer"), "leave out --transformer"),
        ("clip", Path("runs/clip"), "whose CLIP reads another text"),
        ("clip", Path("clip.pt"), "activation"),
        ("quick_gelu", True, "give it with --clip"),
        ("model", Path("clip.pt"), "not a published"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    files: Path, external: dict, name: str, value: object, message: str
) -> None:
    value = files / value if value == Path("clip.pt") else value
    with pytest.raises(ValueError, match=message):
        sample(SampleArgs(**external | {name: value}))


def test_a_prompt_or_image_that_cannot_be_read_is_refused_at_once(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        sample(SampleArgs(model=tmp_path, prompt="a red \udcff"))
    with pytest.raises(ValueError, match="no image at nowhere"):
        sample(SampleArgs(model=tmp_path, prompt="a red cross", init_image=Path("nowhere")))
    model = DALLE.from_pretrained(chain / "model")
    for refused in (model.generate, lambda prompt: model.scorer.embed_captions([prompt])):
        with pytest.raises(ValueError, match="UTF-8"):
            refused("a red \udcff")


def test_samples_at_once_have_a_directory_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(new_directory, "aaaaaaaa")}) == 8


class TestSample:
    @pytest.fixture
    def sample(self, script, chain, prompt):
        words = ["--model", chain / "model", "--prompt", prompt, "--device", "cpu"]
        return lambda *more: script("sample", *words, "--best-of", "2", "--num-images", "1", *more)

    def test_it_never_overwrites_another_sample(self, sample, tmp_path):
        for _ in range(3):
            assert sample().code == 0
        names = sorted(path.name for path in (tmp_path / "runs" / "samples").iterdir())
        assert [name.removeprefix(names[0]) for name in names] == ["", "-2", "-3"]
        assert sample("--out", "mine").code == 0
        before = (tmp_path / "mine" / "00.png").read_bytes()
        assert_refused(sample("--out", "mine", "--seed", "5"), "mine is not empty; give another --out")
        assert (tmp_path / "mine" / "00.png").read_bytes() == before

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_killed_while_it_writes_the_same_command_writes_it_again(self, sample, tmp_path, monkeypatch, n):
        """At its n-th file of three."""
        replace, written = os.replace, []

        def killed(*names):
            written.append(names)
            if len(written) == n:
                raise SystemExit("killed")
            replace(*names)

        with monkeypatch.context() as during:
            during.setattr(os, "replace", killed)
            assert sample("--out", "mine").err == "killed"
        (tmp_path / "mine" / "07.png").touch()  # of a command for more images
        (tmp_path / "mine" / ".writable").touch()
        assert sample("--out", "mine").code == 0
        assert {path.name for path in (tmp_path / "mine").iterdir()} == {"00.png", "grid.png", "sample.json"}

    def test_it_joins_the_runs(self, script, chain, prompt, tmp_path):
        for kind in ("dvae", "transformer", "clip"):
            shutil.copytree(chain / kind, tmp_path / "runs" / kind)
        words = ["--prompt", prompt, "--best-of", "4", "--num-images", "2", "--device", "cpu"]
        done = script("sample", *words)
        assert done.code == 0, done.err
        (folder,) = (tmp_path / "runs" / "samples").iterdir()
        files = {"00.png", "01.png", "grid.png", "sample.json"}
        assert {path.name for path in folder.iterdir()} == files
        assert Image.open(folder / "00.png").size == (32, 32)
        record = read_json(folder / "sample.json")
        assert (record["prompt"], record["best_of"], len(record["images"])) == (prompt, 4, 2)
        assert record["images"][0]["score"] >= record["images"][1]["score"]

    def test_a_failed_sample_leaves_no_directory(self, sample, prompt, tmp_path):
        assert sample("--prompt", " and ".join([prompt] * 5)).code == 1
        assert not (tmp_path / "runs").exists()

    def test_the_json_reproduces_the_images(self, sample, chain, tmp_path):
        sample("--out", "mine", "--seed", "3", "--temperature", "0.7", "--top-k", "5")
        record = read_json(tmp_path / "mine" / "sample.json")
        model = DALLE.from_pretrained(chain / "model")
        assert record.pop("model") == model.hash
        (image,) = record.pop("images")
        again = model.to_precision(record.pop("precision")).generate(record.pop("prompt"), **record)
        assert again.candidates == [image["candidate"]]
        assert again.images[0].tobytes() == Image.open(tmp_path / "mine" / image["file"]).tobytes()

    def test_it_completes_an_image(self, sample, tmp_path):
        half = tmp_path / "half.png"
        Image.new("RGB", (40, 40), "red").save(half)
        assert sample("--init-image", half, "--out", "mine").code == 0
        assert read_json(tmp_path / "mine" / "sample.json")["rows"] == 2
        assert_refused(sample("--init-image", half, "--keep-rows", "0"), "rows must be 1 to 3, got 0")

    def test_it_writes_the_joined_parts_as_a_model_directory(self, sample, chain, tmp_path):
        assert sample("--save-pretrained", "joined").code == 0
        assert DALLE.from_pretrained(tmp_path / "joined").hash == DALLE.from_pretrained(chain / "model").hash
        assert "None is given" in (tmp_path / "joined" / "README.md").read_text()
