"""DALLE-pytorch 1.6.6: its dalle.pt against a reference, and that against the package."""

import re
from typing import Any

import pytest
import torch

from dalle.benchmarks.dalle_pytorch import _stand_ins
from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.dvae import DVAE, DVAEConfig
from dalle.hub.registry import write_model_directory
from dalle.pretrained.family import compare_keys
from dalle.pretrained.load import (
    detect_checkpoint,
    load_external_pipeline,
    load_image_tokenizer,
    load_transformer,
)
from dalle.text.external.huggingface import HuggingFaceTokenizer
from dalle.vqgan import VQGAN
from tests.helpers import dalle_pytorch_reference as reference
from tests.helpers.dalle_pytorch_reference import CODES, SIDE, TEXT, WORDS, make_file, make_weights
from tests.helpers.external import check_logits, check_sampling
from tests.helpers.vqgan_reference import make_state

CASES: dict[str, dict[str, Any]] = {
    "as trained by default": {},
    "learned positions": {"rotary_emb": False},
    "no shift": {"shift_tokens": False, "attn_types": ("full",)},
    "reversible": {"reversible": True, "depth": 3},
    "stable and sandwich": {"stable": True, "sandwich_norm": True, "depth": 2},
    "shared embeddings": {"share_input_output_emb": True, "rotary_emb": False, "depth": 2},
}
CAPTIONS = [[3, 5, 0, 7], [1, 2, 3, 4, 5, 6]]  # the 0 within is a pad to the package
IMAGE = torch.randint(CODES, (2, SIDE * SIDE), generator=torch.Generator().manual_seed(1))


def write(folder, **changed):
    weights = make_weights(**changed)
    return save(folder, make_file(weights, **changed)), weights


def save(folder, file):
    torch.save(file, folder / "dalle.pt")
    return folder / "dalle.pt"


def padded(caption):
    return caption + [0] * (TEXT - len(caption))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_sampling(tmp_path, case):
    path, weights = write(tmp_path, **CASES[case])
    model = load_transformer(path)
    text = model.layout.pad_text(CAPTIONS)
    found = model(model.layout.pack(text, IMAGE))
    for row, caption in enumerate(CAPTIONS):
        expected = reference.logits(weights, padded(caption), IMAGE[row].tolist(), **CASES[case])
        offset = WORDS + TEXT
        check_logits(found[row], expected[:TEXT, :offset], expected[TEXT:, offset:], model.layout)
    check_sampling(model, text, IMAGE, read=SIDE + 2)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_equals_the_package(tmp_path, case):
    with _stand_ins():
        package = pytest.importorskip("dalle_pytorch")
    weights, kept = make_weights(**CASES[case]), package.DiscreteVAE.__init__.__globals__
    kept["log2"] = lambda size: 5.0  # it wants sides that are powers of 2, of which none has 6 columns
    vae = package.DiscreteVAE(**reference.VAE)
    original = package.DALLE(vae=vae, **(reference.HPARAMS | CASES[case])).eval()
    original.load_state_dict(weights, strict=True)
    found = original(torch.tensor([padded(caption) for caption in CAPTIONS]), IMAGE)
    for row, caption in enumerate(CAPTIONS):
        expected = reference.logits(weights, padded(caption), IMAGE[row].tolist(), **CASES[case])
        for part in ((slice(TEXT), slice(WORDS + TEXT)), (slice(TEXT, None), slice(WORDS + TEXT, None))):
            torch.testing.assert_close(expected[part], found[row][part], atol=2e-4, rtol=2e-4)
    path, _ = write(tmp_path, **CASES[case])
    pixels = torch.rand(2, 3, 24, 24)
    tokenizer = load_image_tokenizer(path)
    assert torch.equal(tokenizer.encode(pixels), vae.get_codebook_indices(pixels))
    shown = vae.decode(IMAGE) / 2 + 0.5
    torch.testing.assert_close(tokenizer.decode(IMAGE), shown.clamp(0, 1))


def test_generation(tmp_path):
    text = HuggingFaceTokenizer(reference.TOKENIZER)
    model = load_external_pipeline(write(tmp_path)[0], text)
    options = {"n": 2, "best_of": 2, "seed": 1, "batch_size": 2}
    generation = model.generate("a b", **options)
    assert generation.images[0].size == (24, 24)
    assert torch.equal(generation.image_tokens, model.generate("a b", **options).image_tokens)
    completed = model.complete("a b", generation.images[0], rows=3, n=1, best_of=1)
    assert completed.image_tokens.shape == (1, SIDE * SIDE)
    assert torch.isfinite(model.log_likelihood("a b", generation.image_tokens).image).all()
    with pytest.raises(ValueError, match="of this library"):
        write_model_directory(tmp_path / "model", {"transformer": model.transformer}, text)
    layout = model.transformer.layout
    assert layout.pad_text([[1] * TEXT]).tolist() == [[1] * TEXT]
    with pytest.raises(ValueError, match="at most 6 fit"):
        layout.pad_text([[1] * (TEXT + 1)])


def test_a_vqgan_or_openais_dvae_inside(tmp_path):
    plain = {name: tensor for name, tensor in make_weights().items() if not name.startswith("vae.")}
    vqgan = {f"vae.model.{name}": tensor for name, tensor in make_state().items()}
    sizes = {"blocks_per_group": 1, "downsample_factor": 2, "vocab_size": CODES, "codebook_dim": 4}
    dvae = DVAE(DVAEConfig(widths=(8, 8), **sizes))
    dvae_names = {f"vae.{n.replace('oder', '', 1)}": tensor for n, tensor in dvae.state_dict().items()}
    for inner, kind in ((vqgan | {"vae.model.loss.x": torch.zeros(1)}, VQGAN), (dvae_names, DVAE)):
        path = save(tmp_path, make_file(plain | inner) | {"vae_params": None})
        model = load_image_tokenizer(path)
        assert isinstance(model, kind)
        load_transformer(path)
    assert torch.equal(model.encode(torch.ones(1, 3, 8, 8) / 3), dvae.encode(torch.ones(1, 3, 8, 8) / 3))
    with pytest.raises(ValueError, match="of kind 'transformer'"):
        load_image_tokenizer(save(tmp_path, make_file(plain)))


def test_old_names_of_axial_positions(tmp_path):
    weights = make_weights(rotary_emb=False)
    for axis in "01":
        weights[f"image_pos_emb.weights_{axis}"] = weights.pop(f"image_pos_emb.weights.{axis}")
    path = save(tmp_path, make_file(weights, rotary_emb=False))
    compare_keys(detect_checkpoint(path)).check("dalle.pt")


def test_the_vae_alone(tmp_path):
    weights = {n.removeprefix("vae."): t for n, t in make_weights().items() if n.startswith("vae.")}
    for normalization in ({}, {"normalization": None}, {"normalization": ((0.0,) * 3, (1.0,) * 3)}):
        torch.save({"hparams": reference.VAE | normalization, "weights": weights}, tmp_path / "vae.pt")
        model = load_image_tokenizer(tmp_path / "vae.pt")
        assert (model.downsample_factor, model.vocab_size) == (4, CODES)
        assert model.config.means == ((0.0,) * 3 if normalization else (0.5,) * 3)
        assert model.decode(model.encode(torch.rand(1, 3, 8, 12)), (2, 3)).shape == (1, 3, 8, 12)
    hparams = reference.VAE | {"normalization": (0.5, 0.5)}
    torch.save({"hparams": hparams, "weights": weights}, tmp_path / "vae.pt")
    with pytest.raises(ValueError, match="normalization"):
        load_image_tokenizer(tmp_path / "vae.pt")


def test_inspection(tmp_path):
    path, weights = write(tmp_path)
    report = inspect_checkpoint(InspectCheckpointArgs(path))
    assert (report["family"], report["kind"], report["fits"]) == ("DALLE-pytorch", "transformer", True)
    assert report["sizes"]["kinds"][:2] == ["full", "axial_row"]
    assert set(report["ignored"]) == {name for name in weights if name.startswith("vae.")}


def before_scales(file):
    """As versions 0.x wrote it: no version, and no LayerScale around a path."""
    for name in ("version", "vae_class_name", "opt_state", "scheduler_state"):
        del file[name]
    kept = {name: t for name, t in file["weights"].items() if not name.endswith("scale")}
    file["weights"] = {re.sub(r"(layers\.\d+\.[01]\.)fn\.", r"\1", name): t for name, t in kept.items()}


def test_a_folder_of_deepspeed_is_refused(tmp_path):
    (tmp_path / "dalle-ds-cp/global_step100").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a folder of DeepSpeed: .*zero_to_fp32"):
        inspect_checkpoint(InspectCheckpointArgs(tmp_path / "dalle-ds-cp"))


def hparams(**changed):
    return lambda file: file["hparams"].update(changed)


REFUSED = {
    "another version": (lambda file: file.update(version="1.4.2"), r"version 1\.4\.2"),
    "a version of 2021": (lambda file: file.update(version="0.14.3"), r"version 0\.14\.3"),
    "no version": (lambda file: file.pop("version"), r"before 1\.0"),
    "no version and no scales": (before_scales, r"DALLE-pytorch, .*before 1\.0"),
    "no weights": (lambda file: file.pop("weights"), "next to DeepSpeed's folder"),
    "no hyper-parameters": (lambda file: file.pop("hparams"), "no hparams"),
    "DeepSpeed's layers": (hparams(attn_types=("sparse",)), "kind 'sparse'"),
    "another depth": (hparams(depth=9), "has 9 layers"),
    "no number": (hparams(heads="many"), "heads 'many'"),
    "a text longer than all": (hparams(text_seq_len=99), "positive"),
    "another text": (hparams(text_seq_len=5), r"lacks|wrong shape"),
    "a missing tensor": (
        lambda file: file["weights"].pop("transformer.layers.layers.2.1.fn.norm.bias"),
        r"lacks 1 .*layers\.2\.mlp\.norm\.bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    change, message = REFUSED[case]
    file = make_file(make_weights())
    change(file)
    with pytest.raises(ValueError, match=message):
        load_transformer(save(tmp_path, file))
