"""VQGANs of taming-transformers, ruDALL-E and LlamaGen, from files of their layout, against the network written out."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from vqgan_reference import CODES, LATENT, WIDTHS, make_state, names_of_llamagen, names_of_taming, picture, vectors

from dalle.models import weights_hash
from dalle.pretrained.family import fit, without_values
from dalle.pretrained.load import find, load_image_tokenizer
from dalle.pretrained.pickle_names import SavedTensor
from dalle.pretrained.vqgan import GUMBEL, TAMING
from dalle.stages.encode import take_image_tokenizer
from dalle.types import ImageTokenizer
from dalle.vqgan import VQGAN, VQGANConfig

PIXELS = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))
TRAINING = {
    "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 4, 1, 1),
    "loss.discriminator.main.0.bias": torch.zeros(2),
}


def distances(z: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) and (K, D) -> (B, h, w, K), each difference squared and summed."""
    return (z.movedim(1, -1)[..., None, :] - book).square().sum(-1)


@pytest.mark.parametrize("attention", [(2,), (1, 2), ()])
def test_taming(tmp_path: Path, attention: tuple[int, ...]) -> None:
    state = make_state(names_of_taming, blocks=2, attention=attention)
    torch.save({"epoch": 3, "state_dict": state | TRAINING, "callbacks": {}}, tmp_path / "last.ckpt")
    model = load_image_tokenizer(tmp_path / "last.ckpt")
    assert isinstance(model, ImageTokenizer)
    assert (model.downsampling, model.vocab_size, model.config.attention) == (4, CODES, attention)
    book, z = state["quantize.embedding.weight"], vectors(PIXELS, state, names_of_taming)
    tokens = distances(z, book).argmin(-1)
    assert len(tokens.unique()) > 4
    assert torch.equal(model.encode(PIXELS), tokens.flatten(1))
    expected = picture(book[tokens].movedim(-1, 1), state, names_of_taming)
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 6)), expected, atol=1e-4, rtol=1e-4)
    assert 0 <= expected.min() < 0.4
    assert 0.6 < expected.max() <= 1


def test_gumbel_of_taming_and_rudalle(tmp_path: Path) -> None:
    state = make_state(names_of_taming, gumbel=True)
    torch.save({"state_dict": state | TRAINING}, tmp_path / "vqgan.gumbelf8-sber.model.ckpt")
    model = load_image_tokenizer(tmp_path / "vqgan.gumbelf8-sber.model.ckpt")
    assert model.config.choice == "logits"
    z = vectors(PIXELS, state, names_of_taming)
    tokens = F.conv2d(z, state["quantize.proj.weight"], state["quantize.proj.bias"]).argmax(1)
    assert torch.equal(model.encode(PIXELS), tokens.flatten(1))
    expected = picture(state["quantize.embed.weight"][tokens].movedim(-1, 1), state, names_of_taming)
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 6)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", ["model", "ema", "state_dict"])
def test_llamagen(tmp_path: Path, key: str) -> None:
    state = make_state(names_of_llamagen, blocks=2)
    torch.save({key: state | {"quantize.codebook_used": torch.zeros(65536)}, "steps": 1}, tmp_path / "vq.pt")
    model = load_image_tokenizer(tmp_path / "vq.pt")
    assert model.config.choice == "cosine"
    book = F.normalize(state["quantize.embedding.weight"], dim=1)
    z = vectors(PIXELS, state, names_of_llamagen)
    tokens = distances(F.normalize(z, dim=1), book).argmin(-1)
    assert not torch.equal(tokens, distances(z, state["quantize.embedding.weight"]).argmin(-1))
    assert torch.equal(model.encode(PIXELS), tokens.flatten(1))
    expected = picture(book[tokens].movedim(-1, 1), state, names_of_llamagen)
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 6)), expected, atol=1e-4, rtol=1e-4)


def test_against_the_package_of_taming(tmp_path: Path) -> None:
    parts = pytest.importorskip("taming.modules.diffusionmodules.model", reason="taming-transformers is not installed")
    quantize = pytest.importorskip("taming.modules.vqvae.quantize", reason="taming-transformers is not installed")
    torch.manual_seed(0)
    shape = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 2), "num_res_blocks": 2, "attn_resolutions": [8],
             "in_channels": 3, "resolution": 32, "z_channels": LATENT, "double_z": False}  # fmt: skip
    whole = torch.nn.ModuleDict({
        "encoder": parts.Encoder(**shape), "decoder": parts.Decoder(**shape),
        "quantize": quantize.VectorQuantizer2(CODES, 6, beta=0.25), "quant_conv": torch.nn.Conv2d(LATENT, 6, 1),
        "post_quant_conv": torch.nn.Conv2d(6, LATENT, 1),
    }).eval()  # fmt: skip
    torch.save({"state_dict": whole.state_dict()}, tmp_path / "last.ckpt")
    model = load_image_tokenizer(tmp_path / "last.ckpt")
    codes, _, (_, _, tokens) = whole["quantize"](whole["quant_conv"](whole["encoder"](2 * PIXELS - 1)))
    assert torch.equal(model.encode(PIXELS).flatten(), tokens.flatten())
    expected = (whole["decoder"](whole["post_quant_conv"](codes)).clamp(-1, 1) + 1) * 0.5
    torch.testing.assert_close(model.decode(tokens.view(2, -1), (4, 6)), expected, atol=1e-5, rtol=1e-5)


PUBLISHED = {  # tensors and parameters without the losses, counted on the originals
    "f16": (VQGANConfig(), 343, 76_073_859),
    "LlamaGen VQ-16": (VQGANConfig(code_width=8, choice="cosine"), 343, 71_883_403),
    "LlamaGen VQ-8": (
        VQGANConfig(widths=(128, 256, 256, 512), attention=(3,), code_width=8, choice="cosine"), 299, 70_109_835,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    config, tensors, parameters = PUBLISHED[name]
    with without_values():
        model = VQGAN(config)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_published_gumbel_is_recognised() -> None:
    config = VQGANConfig(widths=(128, 128, 256, 512), attention=(3,), vocab_size=8192, choice="logits")
    with without_values():
        state = VQGAN(config).state_dict()
    found = {name: SavedTensor(torch.float32, tuple(t.shape), lambda: torch.empty(0)) for name, t in state.items()}
    found["quantize.embed.weight"] = found.pop("quantize.embedding.weight")
    assert GUMBEL.recognises(found)
    assert not TAMING.recognises(found)
    comparison = fit(GUMBEL, found)
    comparison.check("published")
    assert comparison.config == config
    assert config.downsampling == 8


def test_the_encode_stage_takes_one(tmp_path: Path) -> None:
    torch.save({"state_dict": make_state(names_of_taming)}, tmp_path / "last.ckpt")
    tokenizer, weights = take_image_tokenizer(tmp_path / "last.ckpt", torch.device("cpu"))
    assert weights == weights_hash(tokenizer)
    assert tokenizer.encode(PIXELS).shape == (2, 24)


class TestRefusals:
    def load(self, path: Path, state: dict) -> None:
        torch.save({"state_dict": state}, path / "last.ckpt")
        load_image_tokenizer(path / "last.ckpt")

    def test_codes_numbered_anew(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="numbered anew"):
            self.load(tmp_path, make_state(names_of_taming) | {"quantize.used": torch.arange(4)})

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        state = make_state(names_of_taming)
        del state["decoder.up.2.attn.1.k.bias"]
        with pytest.raises(ValueError, match=r"lacks 1 tensors, first decoder\.up\.2"):
            self.load(tmp_path, state)

    def test_an_unknown_tensor(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"beside the model.*encoder\.more"):
            self.load(tmp_path, make_state(names_of_taming) | {"encoder.more": torch.zeros(1)})

    def test_llamagen_with_a_level_too_few(self, tmp_path: Path) -> None:
        state = {n: t for n, t in make_state(names_of_llamagen).items() if "decoder.conv_blocks.2" not in n}
        with pytest.raises(ValueError, match=r"lacks|another shape"):
            self.load(tmp_path, state)

    def test_other_widths(self, tmp_path: Path) -> None:
        state = make_state(names_of_taming)
        state["encoder.down.0.block.0.conv1.weight"] = torch.zeros(24, 24, 3, 3)
        with pytest.raises(ValueError, match="multiples of 32"):
            self.load(tmp_path, state)

    def test_wavelets(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="wavelets"):
            self.load(tmp_path, {"decoder.decoder.up.0.block.0.conv1.weight": torch.zeros(1)})


def test_doors_check_what_comes_in() -> None:
    model = VQGAN(VQGANConfig(widths=WIDTHS, attention=(), latent=LATENT, code_width=6, vocab_size=CODES))
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.rand(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"\[0, 20\)"):
        model.decode(torch.full((1, 4), CODES))
    with pytest.raises(ValueError, match="do not fill"):
        model.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="choice must be"):
        VQGANConfig(choice="best")
    with pytest.raises(ValueError, match="attention must name levels"):
        VQGANConfig(attention=(5,))
    with pytest.raises(ValueError, match="blocks must be positive"):
        VQGANConfig(blocks=0)


def test_inspection_names_it(tmp_path: Path) -> None:
    torch.save({"model": make_state(names_of_llamagen)}, tmp_path / "vq.pt")
    found = find(tmp_path / "vq.pt")
    assert found.family.name == "VQ of LlamaGen"
    fit(found.family, found.tensors).check("vq.pt")
