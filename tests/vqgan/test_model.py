"""VQGANs of taming-transformers, ruDALL-E and LlamaGen against a plain network (dalle/vqgan)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dalle.evals.reconstruction import run as evaluate_dvae
from dalle.hub.registry import weights_hash
from dalle.pretrained.family import SkipRandomInit
from dalle.pretrained.load import detect_checkpoint, load_image_tokenizer
from dalle.pretrained.vqgan import GUMBEL, TAMING
from dalle.runs.inputs import load_dvae_input
from dalle.types import ImageTokenizer
from dalle.vqgan import VQGAN, VQGANConfig
from tests.helpers.external import check_published
from tests.helpers.vqgan_reference import (
    CODES,
    LATENT,
    WIDTHS,
    as_llamagen,
    decoded,
    image,
    make_state,
    vectors,
)

PIXELS = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
TRAINING = {
    "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1),
    "loss.discriminator.main.0.bias": torch.zeros(2),
}


def nearest(z, book):
    """Codes (B, h, w) of vectors (B, D, h, w), by (K, D)."""
    return torch.cdist(z.movedim(1, -1).flatten(1, 2), book).argmin(-1).view(len(z), *z.shape[2:])


@pytest.fixture
def load(tmp_path):
    """load(contents): the image tokenizer of a file with these contents."""

    def load(contents):
        torch.save(contents, tmp_path / "last.ckpt")
        return load_image_tokenizer(tmp_path / "last.ckpt")

    return load


def check(model, tokens, vectors, state):
    assert torch.equal(model.encode(PIXELS), tokens.flatten(1))
    expected = image(vectors.movedim(-1, 1), state)
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 6)), expected, atol=1e-4, rtol=1e-4)
    assert 0 <= expected.min() < expected.max() <= 1


@pytest.mark.parametrize("attention", [(2,), (1, 2), ()])
def test_taming(load, attention):
    state = make_state(blocks=2, attention=attention)
    model = load({"epoch": 3, "state_dict": state | TRAINING, "callbacks": {}})
    assert isinstance(model, ImageTokenizer)
    assert (model.downsample_factor, model.vocab_size, model.config.attention) == (4, CODES, attention)
    book, z = state["quantize.embedding.weight"], vectors(PIXELS, state)
    tokens = nearest(z, book)
    assert len(tokens.unique()) > 4
    check(model, tokens, book[tokens], state)


def test_gumbel_of_taming_and_rudalle(load):
    state = make_state(gumbel=True)
    model = load({"state_dict": state | TRAINING})
    assert model.config.quantizer == "logits"
    tokens = gumbel_tokens(state)
    check(model, tokens, state["quantize.embed.weight"][tokens], state)


def gumbel_tokens(state):
    z = vectors(PIXELS, state)
    return F.conv2d(z, state["quantize.proj.weight"], state["quantize.proj.bias"]).argmax(1)


HALF = 0.5**0.5
FILTERS = {"g0_col": [HALF, HALF], "g1_col": [HALF, -HALF], "g0_row": [HALF, HALF], "g1_row": [HALF, -HALF]}


def with_wavelets(state, prefix):
    """A Gumbel file's tensors as in ruDALL-E's other file: the decoder one level deeper, 12 channels."""
    generator, wide = torch.Generator().manual_seed(2), {}
    for name, tensor in state.items():
        inside = name.startswith(("decoder.", "post_quant_conv."))
        wide[f"{prefix}{'decoder.' * inside}{name}"] = tensor
    for end, shape in (("weight", (12, WIDTHS[0], 3, 3)), ("bias", (12,))):
        wide[f"{prefix}decoder.decoder.conv_out.{end}"] = torch.randn(shape, generator=generator) / 60
    for name, numbers in FILTERS.items():
        shape = (1, 1, 2, 1) if "col" in name else (1, 1, 1, 2)
        wide[f"{prefix}decoder.idwt.{name}"] = torch.tensor(numbers).view(shape)
    unused = {"weight": torch.zeros(LATENT, LATENT, 1, 1), "bias": torch.zeros(LATENT)}
    return wide | {f"{prefix}post_quant_conv.{name}": tensor for name, tensor in unused.items()}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_rudalle_with_wavelets(load, prefix):
    state = make_state(gumbel=True)
    wide = with_wavelets(state, prefix)
    model, tokens = load({"state_dict": wide}), gumbel_tokens(state)
    assert torch.equal(model.encode(PIXELS), tokens.flatten(1))
    outer = f"{prefix}decoder."
    inner = {name.removeprefix(outer): tensor for name, tensor in wide.items() if name.startswith(outer)}
    bands = decoded(state["quantize.embed.weight"][tokens].movedim(-1, 1), inner)
    expected = torch.empty(2, 3, 32, 48)
    low, (down, across, both) = bands[:, :3], bands[:, 3:].unflatten(1, (3, 3)).unbind(2)
    expected[:, :, 0::2, 0::2] = (low + down + across + both) / 2
    expected[:, :, 1::2, 0::2] = (low - down + across - both) / 2
    expected[:, :, 0::2, 1::2] = (low + down - across - both) / 2
    expected[:, :, 1::2, 1::2] = (low - down - across + both) / 2
    found = model.decode(tokens.flatten(1), (4, 6))
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=1e-4)
    assert 0 < found.min() < found.max() < 1
    with pytest.raises(ValueError, match="two equal shapes"):
        evaluate_dvae(model, [PIXELS])


@pytest.mark.parametrize("key", ["model", "ema", "state_dict"])
def test_llamagen(load, tmp_path, key):
    state = make_state(blocks=2)
    model = load({key: as_llamagen(state) | {"quantize.codebook_used": torch.zeros(65536)}, "steps": 1})
    assert detect_checkpoint(tmp_path / "last.ckpt").family.name == "VQ of LlamaGen"
    assert model.config.quantizer == "cosine"
    book = F.normalize(state["quantize.embedding.weight"], dim=1)
    z = vectors(PIXELS, state)
    tokens = nearest(F.normalize(z, dim=1), book)
    assert not torch.equal(tokens, nearest(z, state["quantize.embedding.weight"]))
    check(model, tokens, book[tokens], state)


LLAMAGEN = VQGANConfig(codebook_dim=8, quantizer="cosine")
PUBLISHED = {
    "f16": (VQGANConfig(), 343, 76_073_859),
    "LlamaGen VQ-16": (LLAMAGEN, 343, 71_883_403),
    "LlamaGen VQ-8": (replace(LLAMAGEN, widths=(128, 256, 256, 512), attention=(3,)), 299, 70_109_835),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Without the losses, counted on the originals."""
    config, tensors, parameters = PUBLISHED[name]
    with torch.device("meta"), SkipRandomInit():
        model = VQGAN(config)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_published_gumbel_is_recognized():
    config = VQGANConfig(widths=(128, 128, 256, 512), attention=(3,), vocab_size=8192, quantizer="logits")
    with torch.device("meta"), SkipRandomInit():
        names = [name.replace("quantize.embedding", "quantize.embed") for name in VQGAN(config).state_dict()]
    assert GUMBEL.matches(names)
    assert not TAMING.matches(names)
    check_published(GUMBEL, Path("published"), names, config)


def test_the_encode_stage_takes_one(tmp_path):
    torch.save({"state_dict": make_state()}, tmp_path / "last.ckpt")
    tokenizer, weights = load_dvae_input(tmp_path / "last.ckpt", torch.device("cpu"))
    assert weights == weights_hash(tokenizer)
    assert tokenizer.encode(PIXELS).shape == (2, 24)


TAMING_FILE, WAVELETS = make_state(), with_wavelets(make_state(gumbel=True), "model.")
LLAMAGEN_FILE = as_llamagen(TAMING_FILE)
WIDTH, CHANNELS = "encoder.down.0.block.0.conv1.weight", "model.decoder.decoder.conv_out.bias"
LEVEL = {name: None for name in LLAMAGEN_FILE if "decoder.conv_blocks.2" in name}
REFUSED = {
    "renumbered codes": (TAMING_FILE, {"quantize.used": torch.arange(4)}, "renumbered"),
    "a missing tensor": (TAMING_FILE, {"decoder.up.2.attn.1.k.bias": None}, r"lacks 1 .*decoder\.up\.2"),
    "a missing level": (LLAMAGEN_FILE, LEVEL, "lacks|wrong shape"),
    "other widths": (TAMING_FILE, {WIDTH: torch.zeros(24, 24, 3, 3)}, "multiples of 32"),
    "a missing filter": (WAVELETS, {"model.decoder.idwt.g1_row": None}, r"lacks 1 .*wavelets\.g1_row"),
    "3 channels": (WAVELETS, {CHANNELS: torch.zeros(3)}, "wrong shape.*conv_out"),
    "another filter": (WAVELETS, {"model.decoder.idwt.g2_row": torch.zeros(1)}, "unexpected.*g2_row"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_fit_are_refused(load, case):
    state, changes, message = REFUSED[case]
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        load({"state_dict": state})


def test_inputs_are_checked():
    model = VQGAN(VQGANConfig(widths=WIDTHS, attention=(), latent=LATENT, codebook_dim=6, vocab_size=CODES))
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"\[0, 20\)"):
        model.decode(torch.full((1, 4), CODES))
    with pytest.raises(ValueError, match="do not fill"):
        model.decode(torch.zeros(1, 6).long())
    for field, value in (("quantizer", "best"), ("attention", (5,)), ("blocks", 0), ("widths", (32,) * 99)):
        with pytest.raises(ValueError, match=f"{field} must"):
            VQGANConfig(**{field: value})
