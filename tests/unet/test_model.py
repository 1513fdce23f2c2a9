"""U-Net and classifier: golden counts, equality with the reference, initialization, precision, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.config import from_dict, to_dict
from dalle.meta_device import SkipRandomInit, build_in_slices
from dalle.unet import Classifier, ClassifierConfig, UNet, UNetConfig
from dalle.unet.blocks import Attention, FP32GroupNorm, ResBlock
from dalle.unet.text import pack_text
from tests.helpers import unet_reference as reference
from tests.unet import published

SMALL = UNetConfig(
    image_size=8,
    width=32,
    channel_mult=(1, 4),
    blocks=1,
    attention=(4,),
    dropout=0.0,
    text_len=reference.TEXT_LEN,
    text_vocab=reference.TEXT_VOCAB,
    text_width=reference.TEXT_WIDTH,
    text_layers=2,
    text_heads=2,
    embedding_width=reference.EMBEDDING,
)
PLAIN = replace(SMALL, text="none")
TIMES = torch.tensor([3.0, 711.5])
CAPTIONS = [[4, 1, 9], []]


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = noise(2, 3, 8, 8)


def loaded(config: UNetConfig, state: dict) -> UNet:
    model = UNet(config)
    model.load_state_dict(state)
    return model.eval()


def texts(captions=CAPTIONS) -> torch.Tensor:
    return pack_text(captions, SMALL.text_len, SMALL.text_vocab)


def on_meta(model_class: type[nn.Module], config) -> nn.Module:
    with torch.device("meta"), SkipRandomInit():
        return model_class(config)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=2e-4)


# Published sizes.


@pytest.mark.parametrize("name", [*published.GLIDE, *published.ADM])
def test_parameters_and_tensors_of_published_files(name):
    config, parameters, tensors = (published.GLIDE | published.ADM)[name]
    model = on_meta(UNet, config)
    assert (size(model), len(model.state_dict())) == (parameters, tensors)


@pytest.mark.parametrize("name", published.OTHERS)
def test_parameters_of_other_published_models(name):
    config, parameters = published.OTHERS[name]
    assert size(on_meta(UNet, config)) == parameters


def test_the_papers_text_transformer_and_the_classifier():
    model = on_meta(UNet, published.OTHERS["GLIDE's paper"][0])
    parts = model.token_embedding, model.transformer, model.final_ln, model.transformer_proj
    assert sum(map(size, parts)) + 2 * 128 * 2048 == 1_316_249_600
    assert size(on_meta(Classifier, published.CLASSIFIER)) == published.CLASSIFIER_PARAMETERS


# Against the reference.


def test_glide():
    """Text, and the order of the input channels: noised image, known pixels, mask, smaller image."""
    config, state = replace(SMALL, low_resolution=True, inpainting=True), reference.make_glide(10)
    model, known, mask = loaded(config, state), noise(2, 3, 8, 8, seed=2), noise(2, 1, 8, 8, seed=3) > 0
    low, half = noise(2, 3, 4, 4, seed=4), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    given = {"known": known, "mask": mask.float(), "low_resolution": low}
    inputs = torch.cat([X, known * mask, mask.float(), half(low)], dim=1)
    expected = reference.glide(state, inputs, TIMES, CAPTIONS)
    with torch.no_grad():
        close(model(X, TIMES, text=texts(), **given), expected)
        states = model.encode_text(texts())
        close(states, reference.text_states(state, CAPTIONS))
        close(model(X, TIMES, text=states, **given), expected)


@pytest.mark.parametrize(
    ("changes", "files", "options"),
    [
        ({"attention_order": "new"}, {}, {"new": True}),
        ({"attention_order": "new", "heads": 4}, {}, {"new": True, "heads": 4}),
        ({"heads": 4}, {}, {"heads": 4}),
        ({"scale_shift": False, "learned_variance": False}, {"scale_shift": False, "n_out": 3}, {}),
    ],
)
def test_options(changes, files, options):
    state = reference.make_unet(**files)
    with torch.no_grad():
        found = loaded(replace(PLAIN, **changes), state)(X, TIMES)
    close(found, reference.unet(state, X, TIMES, **options))
    other = {"new": not options.get("new", False), "heads": 2}  # a wrong order would be noticed
    assert (found - reference.unet(state, X, TIMES, **other)).abs().max() > 0.01


def test_class_labels():
    state = reference.make_unet(classes=5)
    with torch.no_grad():
        found = loaded(replace(PLAIN, classes=5), state)(X, TIMES, labels=torch.tensor([4, 0]))
    close(found, reference.unet(state, X, TIMES, extra=state["label_emb.weight"][[4, 0]].double()))


def test_an_image_embedding_and_states_of_a_clip():
    state = reference.make_karlo()
    model = loaded(replace(SMALL, text="clip", image_embedding=True), state)
    image, vector, states = noise(2, 24, seed=2), noise(2, 24, seed=3), noise(2, 5, 24, seed=4)
    seen = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])
    given = {"text": states, "text_embedding": vector, "text_mask": seen}
    with torch.no_grad():
        close(
            model(X, TIMES, image_embedding=image, **given),
            reference.karlo(state, X, TIMES, image, vector, states, seen),
        )
        names = "text", "text_embedding", "image_embedding"  # as a CLIP under autocast gives them
        half = {name: value.bfloat16() for name, value in zip(names, (states, vector, image), strict=True)}
        rounded = {name: value.float() for name, value in half.items()}
        assert torch.equal(model(X, TIMES, **half), model(X, TIMES, **rounded))
        null = model.cf_param.expand(2, -1)
        assert torch.equal(model(X, TIMES, **given), model(X, TIMES, image_embedding=null, **given))


def test_classifier():
    state = reference.make_classifier()
    config = ClassifierConfig(
        image_size=8, width=32, channel_mult=(1, 4), blocks=2, attention=(4,), classes=5
    )
    model = Classifier(config)
    model.load_state_dict(state)
    x = X.clone().requires_grad_()
    logits = model.eval()(x, TIMES)
    close(logits.detach(), reference.classifier(state, X, TIMES))
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, 2].sum(), x)
    assert (gradient.abs().amax((1, 2, 3)) > 1e-4).all()
    with pytest.raises(ValueError, match="resize"):
        model(noise(2, 3, 16, 16), TIMES)


# Properties.


def test_it_begins_as_zero_and_its_blocks_as_the_identity():
    torch.manual_seed(0)
    assert not UNet(PLAIN)(X, TIMES).any()
    x, emb = noise(2, 64, 4, 4), noise(2, 128)
    assert torch.equal(ResBlock(64, 64, SMALL)(x, emb), x)
    assert torch.equal(Attention(64, SMALL, 128)(x, noise(2, 6, 128)), x)


def test_pads_are_read_and_their_id_is_not():
    model = loaded(SMALL, reference.make_glide())
    with torch.no_grad():
        expected = model(X, TIMES, text=texts())
        other = texts() + 7 * (texts() == SMALL.text_vocab)
        assert torch.equal(model(X, TIMES, text=other), expected)
        model.padding_embedding[4] += 1
        assert not torch.allclose(model(X, TIMES, text=texts()), expected)


def test_an_inpainting_model_with_zero_weights_for_its_channels_is_the_base():
    state = reference.make_unet()
    base = loaded(PLAIN, state)
    more = torch.zeros(32, 4, 3, 3)
    weight = torch.cat([state["input_blocks.0.0.weight"], more], dim=1)
    model = loaded(replace(PLAIN, inpainting=True), state | {"input_blocks.0.0.weight": weight})
    given = {"known": noise(2, 3, 8, 8, seed=2), "mask": torch.ones(2, 1, 8, 8)}
    with torch.no_grad():
        for known in ({}, given):
            torch.testing.assert_close(model(X, TIMES, **known), base(X, TIMES))


def test_activation_checkpointing_gives_the_same_gradients():
    config, state = replace(SMALL, dropout=0.5), reference.make_glide()
    gradients = []
    for checkpointing in (False, True):
        model = loaded(replace(config, activation_checkpointing=checkpointing), state).train()
        torch.manual_seed(5)
        model(X, TIMES, text=texts()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_group_norms_are_fp32_under_autocast(monkeypatch):
    seen, group_norm = [], F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: seen.append(x.dtype) or group_norm(x, *rest))
    norm, x = FP32GroupNorm(32), 300 + noise(1, 32, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert (seen, found.dtype) == ([torch.float32], torch.bfloat16)
    exact = x.double()
    exact = (exact - exact.mean((2, 3), keepdim=True)) / exact.std((2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(found.double(), exact, atol=0.01, rtol=0.01)


def test_autocast_is_near_fp32_and_its_result_fp32():
    model = loaded(SMALL, reference.make_glide())
    with torch.no_grad():
        exact = model(X, TIMES, text=texts())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(X, TIMES, text=texts())
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_sharded_groups_hold_each_layer_of_the_blocks_once_and_no_norm():
    model = UNet(SMALL)
    inside = [module for group in model.fsdp_groups() for module in group]
    layers = [layer for module in inside for layer in module.modules() if list(layer.parameters(False))]
    assert len(layers) == len(set(layers))
    assert not any(isinstance(layer, nn.GroupNorm | nn.LayerNorm) for layer in layers)
    blocks = [*model.input_blocks[1:], model.middle_block, *model.output_blocks, *model.transformer.resblocks]
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    assert {layer for block in blocks for layer in block.modules() if isinstance(layer, kinds)} == set(layers)


def test_it_is_built_from_slices_and_any_multiple_of_its_factor_is_a_size():
    torch.manual_seed(3)
    whole = UNet(SMALL)
    torch.manual_seed(3)
    _, slices = build_in_slices(lambda: UNet(SMALL), torch.clone)
    assert all(torch.equal(slices[name], parameter) for name, parameter in whole.named_parameters())
    assert whole(noise(1, 3, 6, 10), TIMES[:1], text=texts([[]])).shape == (1, 6, 6, 10)


# Refusals.


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {}, "trained with text"),
        ({"text": "none"}, {"text": texts()}, "without text"),
        ({"text": "none", "classes": 5}, {}, "with labels"),
        ({"text": "none", "low_resolution": True}, {}, "with low_resolution"),
        ({"text": "none"}, {"mask": X[:, :1]}, "without mask"),
        ({"text": "none", "inpainting": True}, {"known": X}, "both be given"),
        ({"text": "none", "inpainting": True}, {"known": X, "mask": X[:, :1, :4]}, "both be given"),
        ({"text": "none"}, {"text_mask": texts() > 0}, "without text_mask"),
        ({"text": "none"}, {"image_embedding": noise(2, 24)}, "without image_embedding"),
        ({}, {"text": texts()[:, :3]}, "6 positions, got 3"),
        ({}, {"text": -texts()}, r"in \[0"),
    ],
)
def test_conditions_that_do_not_fit(changes, given, message):
    with pytest.raises(ValueError, match=message):
        UNet(replace(SMALL, **changes))(X, TIMES, **given)


def test_images_and_captions_that_do_not_fit():
    for shape in ((2, 3, 7, 8), (2, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="multiples of 2"):
            UNet(PLAIN)(noise(*shape), TIMES)
    with pytest.raises(ValueError, match="has 7 tokens"):
        texts([[1] * 7])
    assert pack_text([[1] * 7], 6, 11, truncate=True).tolist() == [[1] * 6]
    with pytest.raises(ValueError, match="got 11"):
        texts([[11]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channel_mult": ()}, "1 to 16 levels"),
        ({"width": 48}, "multiples of 32"),
        ({"image_size": 60}, "no multiple of 8"),
        ({"attention": (12,)}, "among 64, 32, 16, 8, got 12"),
        ({"head_width": 48, "width": 160}, "do not divide into heads of width 48"),
        ({"heads": 5}, "into 5 heads"),
        ({"dropout": 1.0}, "dropout"),
        ({"text_heads": 7}, "7 heads"),
        ({"text": "t5"}, "one of ids, clip, none"),
        ({"classes": 0}, "classes must be positive"),
        ({"diffusion": {"schedule": "linear", "steps": 20}}, "linear schedule must be 21 to 65536, got 20"),
        ({"diffusion": {"steps": 1}}, "must be 2 to"),
        ({"diffusion": {"caption_dropout": 1.0}}, r"caption_dropout must be in \[0, 1\)"),
    ],
)
def test_sizes_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)
    with pytest.raises(ValueError, match="heads must be None"):
        ClassifierConfig(heads=4)


def test_configurations_survive_json():
    config = replace(published.GLIDE["upsample_inpaint"][0], heads=4, classes=3)
    assert from_dict(UNetConfig, to_dict(config)) == config
    assert from_dict(ClassifierConfig, to_dict(ClassifierConfig())) == ClassifierConfig()
