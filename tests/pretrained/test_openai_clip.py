"""CLIP of OpenAI's archives and state dicts and of open_clip's checkpoints: open_clip's scores."""

import copy

import pytest
import torch

from dalle.pretrained.load import detect_checkpoint, load_image_tokenizer
from dalle.pretrained.openai_clip import build, infer_config, load_scorer
from tests.helpers.external import OPENAI_CLIP, make_open_clip

open_clip = pytest.importorskip("open_clip")
PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CAPTION = "a red circle above a blue square"


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    model = make_open_clip(layers=2).eval()
    with torch.no_grad():  # as if it were trained: far enough from zero that the activations differ
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def expected(towers):
    constants = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    mean, std = (torch.tensor(values)[:, None, None] for values in constants)
    image = towers.encode_image((PIXELS - mean) / std, normalize=True)
    ids = open_clip.SimpleTokenizer(context_length=16)([CAPTION])
    return (image @ towers.encode_text(ids, normalize=True).T)[:, 0].detach()


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_torchscript_archive_as_openai_publishes(tmp_path, towers, expected):
    published = copy.deepcopy(towers)
    published.attn_mask = None  # no buffer of OpenAI's
    for name, number in OPENAI_CLIP.items():
        vars(published).pop(name, None)
        published.register_buffer(name, number)
    traced = torch.jit.trace_module(published, {"encode_image": PIXELS[:1]})
    torch.jit.save(traced, tmp_path / "ViT.pt")
    assert detect_checkpoint(tmp_path / "ViT.pt").family.name == "OpenAI CLIP"
    scorer = load_scorer(tmp_path / "ViT.pt")
    torch.testing.assert_close(scorer.score(PIXELS, CAPTION), expected)


def test_state_dicts_of_openai(tmp_path, towers, expected):
    published = towers.state_dict() | OPENAI_CLIP
    torch.save(published, tmp_path / "clip.pt")
    scorer = load_scorer(tmp_path / "clip.pt")
    torch.testing.assert_close(scorer.score(PIXELS, CAPTION), expected)
    image = PIXELS[:1].clone().requires_grad_()
    scorer.score(image, "a " * 40).sum().backward()
    assert image.grad.abs().sum() > 0
    assert scorer.truncated == 1
    with pytest.raises(ValueError, match="OpenAI's"):
        load_scorer(tmp_path / "clip.pt", quick_gelu=False)
    with pytest.raises(ValueError, match="OpenAI CLIP"):
        load_image_tokenizer(tmp_path / "clip.pt")
    half = {n: t.half() if t.is_floating_point() else t for n, t in published.items()}
    torch.save(half, tmp_path / "clip.pt")
    scorer = load_scorer(tmp_path / "clip.pt")
    assert {p.dtype for p in scorer.model.parameters()} == {torch.float32}
    torch.testing.assert_close(scorer.score(PIXELS, CAPTION), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module.model."])
def test_open_clip_needs_its_activation(tmp_path, towers, expected, prefix):
    state = {prefix + name: tensor for name, tensor in towers.state_dict().items()}
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match="does not hold its activation"):
        load_scorer(tmp_path / "epoch_1.pt")
    torch.testing.assert_close(
        load_scorer(tmp_path / "epoch_1.pt", quick_gelu=True).score(PIXELS, CAPTION), expected
    )
    other = load_scorer(tmp_path / "epoch_1.pt", quick_gelu=False).score(PIXELS, CAPTION)
    assert (other - expected).abs().max() > 1e-4


def test_a_resnet_by_its_shapes():
    with torch.device("meta"):
        model = make_open_clip(32, layers=(1, 2, 1, 1), side=64, patch_size=None)
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        config = infer_config(shapes)
        again = build(config, quick_gelu=True)
    vision = config["vision_cfg"]
    assert (vision["layers"], vision["image_size"]) == ((1, 2, 1, 1), 64)
    assert {name: tuple(t.shape) for name, t in again.state_dict().items()} == shapes


FAULTS = {
    "another vocabulary": ({"token_embedding.weight": torch.zeros(1000, 64)}, "1000 text ids"),
    "other dimensions": ({"visual.conv1.weight": torch.zeros(64)}, "dimensions"),
    "a missing tensor": ({"visual.ln_post.weight": None}, r"lacks 1 .*visual\.ln_post\.weight"),
    "no projection": ({"ln_final.bias": None, "text_projection": None}, "OpenAI's layout"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_refusals(tmp_path, towers, case):
    changes, message = FAULTS[case]
    state = towers.state_dict() | OPENAI_CLIP | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=message):
        load_scorer(tmp_path / "clip.pt")
