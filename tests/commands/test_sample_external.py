"""scripts/sample.py with external files: a transformer with its models, a CLIP to rank by."""

import json
from pathlib import Path

import pytest
import torch

from dalle.commands.sample import SampleArgs, sample
from dalle.sampling import SamplingConfig
from tests.helpers.dalle_pytorch_reference import TOKENIZER, make_file, make_weights
from tests.helpers.external import OPENAI_CLIP, open_clip_weights


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
