"""GLIDE's and guided-diffusion's files: small ones of their layout with equal outputs, the real sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle.meta_device import SkipRandomInit
from dalle.pretrained import unet
from dalle.pretrained.family import DetectedCheckpoint, compare_keys
from dalle.pretrained.inspect import describe_checkpoint
from dalle.pretrained.load import FAMILIES, load_classifier, load_image_tokenizer, load_unet
from dalle.unet import Classifier, UNet, UNetConfig
from dalle.unet.text import pack_text
from tests.helpers import unet_reference as reference
from tests.unet import published

CAPTIONS, TIMES = [[4, 1, 9], []], torch.tensor([3, 711])
TEXT = pack_text(CAPTIONS, reference.TEXT_LEN, reference.TEXT_VOCAB)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, LOW, KNOWN = noise(2, 3, 8, 8), noise(2, 3, 4, 4, seed=2), noise(2, 3, 8, 8, seed=3)
MASK = (noise(2, 1, 8, 8, seed=4) > 0).float()


def save(path: Path, state: dict) -> Path:
    torch.save(state, path)
    return path


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", published.GLIDE)
def test_glide(tmp_path, name):
    config = published.GLIDE[name][0]
    state = reference.make_glide(config.in_channels)
    model = load_unet(save(tmp_path / f"{name}.pt", state))
    found = model.config
    assert (found.low_resolution, found.inpainting) == (config.low_resolution, config.inpainting)
    assert (found.text_len, found.text_vocab, found.text_layers, found.text_heads) == (6, 11, 2, 2)
    assert (found.width, found.channel_mult, found.blocks, found.attention) == (32, (1, 4), 1, (32,))
    assert found.diffusion == config.diffusion
    assert not model.training
    given, inputs = {"text": TEXT}, [X]
    if config.inpainting:
        given |= {"known": KNOWN, "mask": MASK}
        inputs += [KNOWN * MASK, MASK]
    if config.low_resolution:
        given["low_resolution"] = LOW
        inputs.append(torch.nn.functional.interpolate(LOW, (8, 8), mode="bilinear", align_corners=False))
    close(model(X, TIMES, **given), reference.glide(state, torch.cat(inputs, dim=1), TIMES, CAPTIONS))


def test_half_precision_in_the_trunk_as_glide_saves_it(tmp_path):
    state = reference.make_glide()
    half = {name: t.half() if name.startswith("input_blocks") else t for name, t in state.items()}
    model = load_unet(save(tmp_path / "base.pt", half))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rounded = {name: tensor.float() for name, tensor in half.items()}
    close(model(X, TIMES, text=TEXT), reference.glide(rounded, X, TIMES, CAPTIONS))


@pytest.mark.parametrize("heads", [{"attention_order": "new"}, {"heads": 4}, {}])
def test_guided_diffusion(tmp_path, monkeypatch, heads):
    """A U-Net of a known size has the heads that are known of it."""
    monkeypatch.setitem(unet.GUIDED_DIFFUSION, (64, 32, False), heads)
    state = reference.make_unet(classes=5)
    model, labels = load_unet(save(tmp_path / "64x64_diffusion.pt", state)), torch.tensor([4, 0])
    options = {"new": "attention_order" in heads, "heads": heads.get("heads", 2)}
    extra = state["label_emb.weight"][labels].double()
    close(model(X, TIMES, labels=labels), reference.unet(state, X, TIMES, extra, **options))


def test_other_sizes_of_guided_diffusion_need_a_configuration(tmp_path):
    state = reference.make_unet(n_in=6, n_out=3, scale_shift=False)
    file = save(tmp_path / "ema_0.9999_010000.pt", state)
    with pytest.raises(ValueError, match=r"heads are unknown: 64 pixels, width 32.*give its"):
        load_unet(file)
    assert "heads are unknown" in describe_checkpoint(file)["note"]
    config = UNetConfig(
        width=32,
        channel_mult=(1, 4),
        blocks=1,
        attention=(32,),
        text="none",
        scale_shift=False,
        learned_variance=False,
        low_resolution=True,
        heads=4,
    )
    model = load_unet(file, config=config)
    low = torch.nn.functional.interpolate(LOW, (8, 8), mode="bilinear", align_corners=False)
    expected = reference.unet(state, torch.cat([X, low], dim=1), TIMES, heads=4)
    close(model(X, TIMES, low_resolution=LOW), expected)
    with pytest.raises(ValueError, match=r"has wrong shape.*out\.2"):
        load_unet(file, config=replace(config, learned_variance=True))


def test_the_classifier(tmp_path):
    state = reference.make_classifier()
    model = load_classifier(save(tmp_path / "64x64_classifier.pt", state))
    config = model.config
    assert (config.image_size, config.blocks, config.attention, config.classes) == (8, 2, (4,), 5)
    close(model(X, TIMES), reference.classifier(state, X, TIMES))


PUBLISHED = [
    (unet.GLIDE, UNet, published.GLIDE["base"][0]),
    (unet.GLIDE, UNet, published.GLIDE["upsample_inpaint"][0]),
    *((unet.ADM, UNet, config) for config in published.ALL_ADM),
    *((unet.CLASSIFIER, Classifier, config) for config in published.CLASSIFIERS),
]
MARKED = [pytest.param(*row, marks=pytest.mark.slow) if row[2].image_size > 128 else row for row in PUBLISHED]


@pytest.mark.parametrize(("family", "model_class", "config"), MARKED)
def test_the_published_sizes_are_recognized(family, model_class, config):
    with torch.device("meta"), SkipRandomInit():
        tensors = model_class(config).state_dict()
    assert next(f.name for f in FAMILIES if f.matches(tensors)) == family.name
    comparison = compare_keys(DetectedCheckpoint(Path("published"), family, tensors))
    comparison.check("published")
    dropout = config.dropout  # which no file shows
    assert replace(comparison.config, dropout=dropout) == config


def test_a_description(tmp_path):
    report = describe_checkpoint(save(tmp_path / "upsample_inpaint.pt", reference.make_glide(10)))
    assert (report["family"], report["kind"], report["fits"]) == ("GLIDE", "diffusion", True)
    assert report["license"].startswith("MIT")
    assert (report["sizes"]["low_resolution"], report["sizes"]["inpainting"]) == (True, True)
    report = describe_checkpoint(save(tmp_path / "classifier.pt", reference.make_classifier()))
    assert (report["kind"], report["fits"]) == ("classifier", True)


QKV, MIDDLE = "input_blocks.3.1.qkv.weight", "middle_block.2.in_layers.2.bias"
FIRST = "input_blocks.0.0.weight"
REFUSED = {
    "a missing tensor": (lambda s: s.pop(MIDDLE), rf"lacks 1 tensors, first {MIDDLE}"),
    "an unknown tensor": (lambda s: s.update({"unemb.weight": s[QKV]}), r"unexpected.*unemb\.weight"),
    "wrong shape": (lambda s: s.update({QKV: s[QKV][:-1]}), r"wrong shape.*qkv\.weight: \(383"),
    "other inputs": (lambda s: s.update({FIRST: s[FIRST].repeat(1, 3, 1, 1)}), "has 9 input channels"),
    "not a number": (lambda s: s.update({QKV: s[QKV] * torch.nan}), rf"{QKV} holds NaN"),
    "no output": (lambda s: s.pop("out.2.weight"), r"lacks out\.2\.weight"),
    "no first level": (lambda s: s.pop("input_blocks.1.0.out_layers.3.weight"), r"lacks input_blocks\.1\.0"),
    "latent diffusion": (
        lambda s: s.update({"input_blocks.1.1.transformer_blocks.0.norm1.weight": s[QKV]}),
        "latent diffusion",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    change, message = REFUSED[case]
    state = reference.make_glide()
    change(state)
    with pytest.raises(ValueError, match=message):
        load_unet(save(tmp_path / "base.pt", state))


def test_another_kind_is_refused(tmp_path):
    file = save(tmp_path / "base.pt", reference.make_glide())
    with pytest.raises(ValueError, match=r"'diffusion' \(GLIDE\), not a published image tokenizer"):
        load_image_tokenizer(file)
    with pytest.raises(ValueError, match="not a published diffusion"):
        load_unet(save(tmp_path / "classifier.pt", reference.make_classifier()))
    with pytest.raises(ValueError, match="not a published classifier"):
        load_classifier(file)
