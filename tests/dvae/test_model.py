"""The dVAE (sections 2.1, A.1) against the paper's counts and OpenAI's modules (dalle/dvae/model.py)."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dalle.dvae import DVAE, DVAEConfig
from dalle.dvae.losses import gumbel_softmax
from dalle.dvae.model import Conv2d, map_pixels, unmap_pixels

SMALL = DVAEConfig(widths=(8, 16, 32, 64), vocab_size=24, codebook_dim=12)
TINY = DVAEConfig(widths=(8, 8), downsample_factor=2, blocks_per_group=1, vocab_size=7, codebook_dim=5)


def build(config, seed=0):
    """A dVAE whose biases are random too, as after training."""
    torch.manual_seed(seed)
    model = DVAE(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            torch.nn.init.normal_(parameter)
    return model


def random_pixels(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# Equal to OpenAI's published modules: at paper size in names and shapes, on shared weights in values.


@pytest.fixture
def package():
    return pytest.importorskip("dall_e", reason="needs OpenAI's package dall-e, the golden reference")


@pytest.fixture
def released(package):
    """OpenAI's encoder and decoder with the weights of build(SMALL)."""
    model, encoder = build(SMALL), package.Encoder(n_hid=8, vocab_size=24)
    decoder = package.Decoder(n_hid=8, n_init=12, vocab_size=24)
    encoder.load_state_dict(model.encoder.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    return encoder, decoder


def shapes_of(module):
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def test_parameters_at_paper_size_have_the_releases_names_and_shapes(package):
    with torch.device("meta"):
        ours, theirs = DVAE(DVAEConfig()), (package.Encoder(device="meta"), package.Decoder(device="meta"))
    for half, other, size in zip((ours.encoder, ours.decoder), theirs, (53_786_240, 43_829_766), strict=True):
        assert shapes_of(half) == shapes_of(other)
        assert sum(p.numel() for p in half.parameters()) == size


@pytest.mark.parametrize(("part", "shape"), [("encoder", (2, 3, 32, 24)), ("decoder", (2, 24, 4, 3))])
def test_value_and_gradient_equal_the_published_module(released, part, shape):
    ours, theirs = getattr(build(SMALL), part), dict(zip(("encoder", "decoder"), released, strict=True))[part]
    x = random_pixels(*shape)
    assert torch.equal(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name


def test_encode_and_decode_follow_the_published_recipe(package, released):
    model, pixels, (encoder, decoder) = build(SMALL), random_pixels(2, 3, 32, 32), released
    tokens = encoder(package.map_pixels(pixels)).argmax(dim=1)
    codes = F.one_hot(tokens, 24).permute(0, 3, 1, 2).float()
    images = package.unmap_pixels(torch.sigmoid(decoder(codes)[:, :3]))
    assert torch.equal(map_pixels(pixels), package.map_pixels(pixels))
    assert torch.equal(unmap_pixels(pixels), package.unmap_pixels(pixels))
    assert torch.equal(model.encode(pixels), tokens.flatten(1))
    torch.testing.assert_close(model.decode(tokens.flatten(1)), images)


def test_initial_weights_are_normal_with_variance_one_over_fan_in():
    torch.manual_seed(0)
    conv = Conv2d(32, 64, 3)
    assert conv.w.std().item() == pytest.approx(1 / math.sqrt(32 * 9), rel=0.03)
    assert not conv.b.any()


def test_residual_paths_are_scaled_by_one_over_the_squared_number_of_blocks_unless_given():
    with torch.device("meta"):
        assert DVAE(DVAEConfig()).decoder.blocks.group_1.block_2.gain == 1 / 64  # 4 groups of 2 blocks
    x = random_pixels(1, 8, 4, 4)
    for config, gain in ((SMALL, 1 / 64), (replace(SMALL, residual_scale=0.5), 0.5)):
        block = build(config).encoder.blocks.group_2.block_1
        torch.testing.assert_close(block(x), block.id_path(x) + gain * block.res_path(x))


# Any size by configuration.


@pytest.mark.parametrize("blocks_per_group", [1, 3])
@pytest.mark.parametrize(
    ("downsample_factor", "widths"),
    [(1, (8,)), (2, (8, 12)), (4, (4, 8, 8)), (8, (4, 8, 8, 4)), (1, (8, 8)), (2, (4,) * 5)],
)
def test_shapes_of_any_configuration(downsample_factor, widths, blocks_per_group):
    config = DVAEConfig(widths, blocks_per_group, downsample_factor, vocab_size=11, codebook_dim=6)
    model, pixels = build(config), random_pixels(2, 3, 16, 24)
    grid = (16 // downsample_factor, 24 // downsample_factor)
    tokens = model.encode(pixels)
    assert (tokens.shape, tokens.dtype) == ((2, grid[0] * grid[1]), torch.int64)
    images = model.decode(tokens, grid)
    assert (images.shape, images.dtype) == (pixels.shape, torch.float32)
    assert 0 <= images.min() <= images.max() <= 1
    blocks = [name for name in model.state_dict() if name.endswith("conv_1.w")]
    assert len(blocks) == 2 * len(widths) * blocks_per_group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downsample_factor": 3}, r"power of two up to 8, got 3"),
        ({"downsample_factor": 16}, r"up to 8, got 16 with 4 groups; add a width or lower it"),
        ({"downsample_factor": 0}, "got 0"),
        ({"downsample_factor": -2}, "got -2"),
        ({"widths": ()}, "with 0 groups"),
        ({"widths": (8, 16, 30, 64)}, "multiples of 4 .* got 30"),
        ({"widths": (8, 16, 32, 0)}, "got 0"),
        ({"widths": (8, 16, 32, -4)}, "got -4"),
        ({"blocks_per_group": 0}, "blocks_per_group must be positive, got 0"),
        ({"vocab_size": 0}, "vocab_size must be positive, got 0"),
        ({"codebook_dim": -1}, "codebook_dim must be positive, got -1"),
    ],
)
def test_an_invalid_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DVAEConfig(**change)


# What encode and decode promise.


def test_encode_takes_the_most_likely_code_of_each_position_in_raster_order():
    model, pixels = build(SMALL), random_pixels(1, 3, 16, 24)
    with torch.no_grad():  # no code is more likely than the others on the whole
        model.encoder.blocks.output.conv.b -= model.codebook_logits(pixels).mean(dim=(0, 2, 3))
    logits, tokens = model.codebook_logits(pixels), model.encode(pixels)
    assert torch.equal(logits, model.encoder(0.8 * pixels + 0.1))  # pixels are mapped inward
    assert logits.shape == (1, 24, 2, 3)
    assert len(tokens.unique()) > 2
    for row in range(2):
        for column in range(3):
            assert tokens[0, row * 3 + column] == logits[0, :, row, column].argmax()


def test_each_token_determines_its_own_square():
    """Without residual paths the decoder has 1x1 convolutions only, so a token reaches no further."""
    model = build(DVAEConfig((8, 8, 8), 2, 4, vocab_size=5, codebook_dim=8, residual_scale=0.0))
    tokens = torch.zeros(1, 2 * 3, dtype=torch.int64)
    changed = tokens.clone()
    changed[0, 1 * 3 + 2] = 4  # row 1, column 2 of a grid of 2 x 3
    difference = (model.decode(tokens, (2, 3)) != model.decode(changed, (2, 3))).any(dim=1)[0]
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(difference, expected)


def test_decode_makes_a_square_without_gradients_unless_told_the_grid():
    model, codes = build(TINY), random_pixels(1, 7, 2, 2)
    torch.testing.assert_close(model.reconstruct(codes), tuple(model.decoder(codes).chunk(2, dim=1)))
    images = model.decode(torch.arange(4)[None])
    assert (images.shape, images.requires_grad) == ((1, 3, 4, 4), False)
    assert model.decode(torch.arange(6)[None], (1, 6)).shape == (1, 3, 2, 12)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.rand(3, 8, 8), r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.rand(1, 8, 8, 3), r"got \(1, 8, 8, 3\)"),
        (torch.rand(0, 3, 8, 8), r"got none: \(0, 3, 8, 8\)"),
        (torch.rand(1, 3, 0, 8), r"got none: \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8; divide .* by 255"),
        (torch.rand(1, 3, 9, 8), r"multiples of 2, got \(9, 8\)"),
        (torch.rand(1, 3, 8, 7), r"multiples of 2, got \(8, 7\)"),
        (torch.rand(1, 3, 8, 8) * 255, r"\[0, 1\], got .* divide by 255"),
        (torch.rand(1, 3, 8, 8) * 2 - 1, r"map \[-1, 1\] by \(x \+ 1\) / 2"),
        (torch.full((1, 3, 8, 8), 1.2), "clamp to"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN or infinite"),
        (torch.rand(1, 3, 8, 8).index_fill(3, torch.tensor(5), float("inf")), "NaN or infinite"),
    ],
)
def test_encode_refuses_invalid_pixels(pixels, message):
    with pytest.raises(ValueError, match=message):
        build(TINY).encode(pixels)


@pytest.mark.parametrize(
    ("tokens", "grid", "message"),
    [
        (torch.tensor([[0, 1, 2, 3], [0, 1, 7, 3]]), None, r"in \[0, 7\), got 7 at row 1, position 2"),
        (torch.tensor([[0, -1, 2, 3]]), None, r"in \[0, 7\), got -1 at row 0, position 1"),
        (torch.zeros(1, 4), None, r"image_tokens must be int64 \(B, N\), got torch.float32"),
        (torch.zeros(1, 2, 2, dtype=torch.int64), None, r"got torch.int64 \(1, 2, 2\)"),
        (torch.zeros(1, 6, dtype=torch.int64), None, "6 tokens .* grid of 2 x 2"),
        (torch.zeros(1, 6, dtype=torch.int64), (2, 2), "6 tokens .* grid of 2 x 2"),
    ],
)
def test_decode_refuses_invalid_tokens(tokens, grid, message):
    with pytest.raises(ValueError, match=message):
        build(TINY).decode(tokens, grid)


# Both sides of the relaxation are in fp32 whatever the precision of the rest (A.1, release).


def test_the_relaxation_and_the_convolutions_beside_it_stay_fp32_under_autocast():
    model, pixels = build(SMALL), random_pixels(2, 3, 16, 16)
    seen = {}
    layers = {
        "first": model.encoder.blocks.input,
        "logits": model.encoder.blocks.output.conv,
        "codes": model.decoder.blocks.input,
        "last": model.decoder.blocks.output.conv,
    }
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, output, name=name: seen.update({name: (x[0], output)}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.codebook_logits(pixels)
        relaxed = gumbel_softmax(logits, 0.5)
        mu, log_b = model.reconstruct(relaxed)
    assert seen["first"][1].dtype == seen["last"][1].dtype == torch.bfloat16  # the rest is in 16 bit
    assert logits.dtype == relaxed.dtype == mu.dtype == log_b.dtype == torch.float32
    for name in ("logits", "codes"):
        layer, (x, output) = layers[name], seen[name]
        assert output.dtype == torch.float32
        assert torch.equal(output, F.conv2d(x.float(), layer.w, layer.b))
    assert seen["codes"][0] is relaxed


# Departures for small models, off by default.


def test_logit_and_codebook_init_scale_the_initial_weights():
    torch.manual_seed(0)
    plain = DVAE(SMALL).codebook_logits(random_pixels(1, 3, 8, 8))
    torch.manual_seed(0)
    small = DVAE(replace(SMALL, logit_init_scale=0.25))
    torch.testing.assert_close(small.codebook_logits(random_pixels(1, 3, 8, 8)), plain / 4)
    model = DVAE(DVAEConfig((8,), 2, 1, vocab_size=64, codebook_dim=64, codebook_init_std=1.0))
    assert model.decoder.blocks.input.w.std().item() == pytest.approx(1, rel=0.05)


def test_min_log_scale_is_a_floor_on_the_log_scale_alone():
    free = build(TINY)
    bound = build(replace(TINY, min_log_scale=0.25))
    codes = random_pixels(1, 7, 2, 2)
    mu, log_b = free.reconstruct(codes)
    assert log_b.min() < 0.25 < log_b.max()
    torch.testing.assert_close(bound.reconstruct(codes), (mu, log_b.clamp(min=0.25)))


def test_embedding_lookup_equals_the_one_hot_convolution():
    model = DVAE(DVAEConfig(widths=(8, 8), downsample_factor=2, vocab_size=11, codebook_dim=6))
    tokens = torch.randint(11, (2, 3, 5))
    one_hot = F.one_hot(tokens, 11).movedim(-1, 1).float()
    torch.testing.assert_close(model.decoder(tokens), model.decoder(one_hot), rtol=1e-6, atol=1e-6)
