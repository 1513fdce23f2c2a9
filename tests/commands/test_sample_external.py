"""scripts/sample.py with files of other programs: a transformer with what lies in it, a CLIP to rank by."""

import json
from pathlib import Path

import pytest
import torch

from dalle.commands.sample import SampleArgs, sample
from dalle.pipelines.config import SamplingConfig
from tests.helpers.dalle_pytorch_reference import make_file, make_weights

TEXT = {
    "model": {"type": "BPE", "vocab": {"!": 0, "a": 1, "b": 2}, "merges": []},
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "added_tokens": [],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dalle.pt, tokenizer.json, clip.pt of open_clip's layout, openai.pt of OpenAI's."""
    open_clip = pytest.importorskip("open_clip.model")
    folder = tmp_path_factory.mktemp("published")
    torch.save(make_file(make_weights(depth=1), depth=1), folder / "dalle.pt")
    (folder / "tokenizer.json").write_text(json.dumps(TEXT))
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=1, width=64, patch_size=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=16, vocab_size=49408, width=64, heads=1, layers=1)
    state = open_clip.CLIP(16, vision, text, quick_gelu=True).state_dict()
    torch.save(state, folder / "clip.pt")
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}
    torch.save(state | numbers | {"vocab_size": torch.tensor(49408)}, folder / "openai.pt")
    return folder


def foreign(files: Path, out: Path, **changed) -> SampleArgs:
    options = {
        "prompt": "a b",
        "model": files / "dalle.pt",
        "text_tokenizer": files / "tokenizer.json",
        "device": "cpu",
    }
    return SampleArgs(
        **options
        | {"best_of": 2, "num_images": 1, "sampling": SamplingConfig(batch_size=2), "out": out}
        | changed
    )


def test_a_transformer_of_others_is_drawn_and_ranked(files: Path, tmp_path: Path) -> None:
    out = sample(foreign(files, tmp_path / "out", clip=files / "openai.pt"))
    told = json.loads((out / "sample.json").read_text())
    assert (out / "00.png").is_file()
    assert (told["best_of"], len(told["images"])) == (2, 1)
    assert -1 <= told["images"][0]["score"] <= 1


def test_a_file_of_captions_goes_on_with_the_same_clip_only(files: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a b\nb a\n")
    asked = {"prompt": "", "prompts_file": tmp_path / "captions.txt", "clip": files / "clip.pt"}
    for _ in range(2):
        out = sample(foreign(files, tmp_path / "out", **asked, quick_gelu=True))
    assert len(list(out.rglob("*.png"))) >= 2
    changed = torch.load(files / "clip.pt", weights_only=True)
    changed["text_projection"] = changed["text_projection"] + 1
    torch.save(changed, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="clip"):
        sample(foreign(files, tmp_path / "out", **asked | {"clip": tmp_path / "other.pt"}, quick_gelu=True))


def test_a_published_clip_ranks_our_own_images(files: Path, chain: Path, prompt: str, tmp_path: Path) -> None:
    scores = []
    for name, quick_gelu in (("openai.pt", None), ("clip.pt", True), ("clip.pt", False)):
        parts = {"dvae": chain / "dvae", "transformer": chain / "transformer", "clip": files / name}
        out = tmp_path / f"{name}-{quick_gelu}"
        sample(
            SampleArgs(
                prompt=prompt, **parts, quick_gelu=quick_gelu, best_of=2, num_images=1, out=out, device="cpu"
            )
        )
        scores.append(json.loads((out / "sample.json").read_text())["images"][0]["score"])
    assert scores[0] == scores[1] != scores[2]


REFUSED = {
    "no text tokenizer": ({"text_tokenizer": None}, "give --text-tokenizer"),
    "a second transformer": ({"transformer": Path("runs/transformer")}, "leave out --transformer"),
    "a CLIP that reads our text ids": ({"clip": Path("runs/clip")}, "whose CLIP reads another text"),
    "an activation that nobody tells": ({"clip": Path("clip.pt")}, "does not hold its activation"),
    "an activation of nothing": ({"quick_gelu": True}, "give it with --clip"),
    "an image tokenizer as the transformer": ({"model": Path("clip.pt")}, "not a published"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(files: Path, tmp_path: Path, case: str) -> None:
    changed, said = REFUSED[case]
    inside = {
        name: files / path
        for name, path in changed.items()
        if isinstance(path, Path) and len(path.parts) == 1
    }
    changed = changed | inside
    with pytest.raises(ValueError, match=said):
        sample(foreign(files, tmp_path / "out", **changed))
