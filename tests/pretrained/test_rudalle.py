"""ruDALL-E: both versions of its file against a reference; its text, sizes and refusals."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.commands.sample import SampleArgs, sample
from dalle.pretrained.load import load_external_pipeline, load_image_tokenizer, load_transformer
from dalle.pretrained.rudalle import model as rudalle
from dalle.pretrained.rudalle.model import FAMILY, RudalleConfig, lowercase
from dalle.text import TextTokenizerConfig, load_text_tokenizer, train_text_tokenizer
from tests.helpers import rudalle_reference as reference
from tests.helpers.external import check_logits, check_published, check_sampling
from tests.helpers.rudalle_reference import CODES, IMAGE_LEN, SIDE, TEXT, WIDTH, WORDS, make_weights
from tests.helpers.vqgan_reference import make_state

CASES: dict[str, dict[str, Any]] = {
    "v2": {"version": "v2"},
    "v3": {"version": "v3"},
    "without sandwich": {"version": "v3", "sandwich": False, "depth": 2},
    "no square, for a column is due": {"version": "v2", "depth": 6},
    "clamped": {"version": "v3", "depth": 2, "gain": 1e5},
}
CAPTIONS = [[7, 5], [9, 8, 7, 6]]
IMAGE = torch.randint(CODES, (2, IMAGE_LEN), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    heads = {(depth, WIDTH): reference.HEADS for depth in (2, 4, 6)}
    monkeypatch.setattr(rudalle, "HEADS", rudalle.HEADS | heads)


def save(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    weights, version = make_weights(**CASES[case]), CASES[case]["version"]
    model = load_transformer(save(tmp_path, weights))
    assert model.config.version == version
    found = model(model.layout.pack(model.layout.pad_text(CAPTIONS), IMAGE))
    first = int(version == "v3")  # of the text ids that a state predicts
    for caption, image, logits in zip(CAPTIONS, IMAGE.tolist(), found, strict=True):
        framed = ([2, *caption, 3] + [0] * TEXT)[:TEXT]
        expected = reference.logits(weights, version, framed, image)[: TEXT + IMAGE_LEN - first]
        text, codes = expected.split([TEXT - first, IMAGE_LEN])
        check_logits(logits, text[:, : WORDS + TEXT], codes[:, WORDS + TEXT :], model.layout)


@pytest.mark.parametrize("at_top", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.uint8])
def test_the_version_by_masks_of_any_dtype_and_name(tmp_path, at_top, dtype):
    weights = make_weights("v2", at_top=at_top)
    weights |= {name: tensor.to(dtype) for name, tensor in weights.items() if name.endswith("_mask")}
    assert load_transformer(save(tmp_path, weights)).config.version == "v2"


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_sampling(tmp_path, version):
    model = load_transformer(save(tmp_path, make_weights(version)))
    check_sampling(model, model.layout.pad_text(CAPTIONS), IMAGE, read=3 * SIDE + 2)


def test_captions_between_begin_and_end(tmp_path):
    layout = load_transformer(save(tmp_path, make_weights("v3"))).layout
    assert layout.pad_text([[7, 5]]).tolist() == [[2, 7, 5, 3, WORDS + 4, WORDS + 5]]
    assert layout.pad_text([[7] * (TEXT - 2)]).tolist() == [[2, *[7] * (TEXT - 2), 3]]
    with pytest.raises(ValueError, match=f"at most {TEXT - 2} fit"):
        layout.pad_text([[7] * (TEXT - 1)])
    assert layout.pad_text([[7] * 9], truncate=True).tolist() == [[2, *[7] * (TEXT - 1)]]  # without its end
    ids = layout.pack(layout.pad_text([[7, 5]]), IMAGE[:1])
    assert layout.loss_mask(ids)[0, :TEXT].tolist() == [False, True, True, True, True, False]


@pytest.fixture
def parts(tmp_path):
    """pytorch_model.bin, bpe.model, vqgan.ckpt."""
    save(tmp_path, make_weights("v3"))
    (tmp_path / "bpe.model").write_text(reference.BPE, encoding="utf-8")
    torch.save({"state_dict": make_state(gumbel=True)}, tmp_path / "vqgan.ckpt")
    return tmp_path


def test_generation_for_captions_in_any_case(parts):
    text, dvae = load_text_tokenizer(parts / "bpe.model"), load_image_tokenizer(parts / "vqgan.ckpt")
    model = load_external_pipeline(parts / "pytorch_model.bin", text, dvae)
    assert text.encode("AB Ж") != text.encode("ab ж") == [4, 8, 4, 7]
    assert model.text.encode("AB Ж") == model.text.encode("\u3000ab ж\u00a0") == text.encode("ab ж")
    generation = model.generate("AB Ж", n=2, best_of=2, seed=1, batch_size=2)
    assert generation.images[0].size == (4 * SIDE, 4 * SIDE)
    assert torch.isfinite(model.log_likelihood("ab", generation.image_tokens).image).all()
    assert pickle.loads(pickle.dumps(model.text)).hash == model.text.hash != text.hash
    with pytest.raises(ValueError, match="image tokenizer"):
        load_external_pipeline(parts / "pytorch_model.bin", text)
    with pytest.raises(ValueError, match="text tokenizer"):
        load_external_pipeline(parts / "pytorch_model.bin")
    files = {"model": "pytorch_model.bin", "text_tokenizer": "bpe.model", "dvae": "vqgan.ckpt"}
    options = {name: parts / file for name, file in files.items()} | {"best_of": 2, "num_images": 2}
    out = sample(SampleArgs(prompt="ab ж", **options, out=parts / "out", device="cpu"))
    assert (out / "01.png").is_file()


def test_its_tokenizer_is_a_youtokentome_model_with_its_ids(parts):
    with pytest.raises(ValueError, match="reads a youtokentome model"):
        lowercase(train_text_tokenizer(["ab"], TextTokenizerConfig(vocab_size=300)))
    (parts / "bpe.model").write_text(reference.BPE.replace("1 0 2 3", "0 1 2 3"), encoding="utf-8")
    with pytest.raises(ValueError, match="has the ids"):
        lowercase(load_text_tokenizer(parts / "bpe.model"))


PUBLISHED = {
    "XL": (RudalleConfig(), 1_310_410_880),
    "Kandinsky": (RudalleConfig(width=3840, depth=64, heads=60), 11_519_306_624),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_published_files_fit(name, version):
    """Shapes alone, under the published names; numbers only in the masks."""
    config, parameters = PUBLISHED[name]
    weights, masks = make_weights(version, config.depth), masks_of_the_published(version)
    config = replace(config, version=version)
    check_published(FAMILY, Path("pytorch_model.bin"), weights, config, parameters, masks)


def masks_of_the_published(version):
    """By rows and columns of the grid, at full size; the square has as many cells as the package's."""
    index = torch.arange(1024)
    q, k = index[:, None], index[None]
    apart = [(a - b).abs() for a, b in ((q // 32, k // 32), (q % 32, k % 32))]
    near = [a <= 5 if version == "v3" else (a <= 5) | (a >= 27) for a in apart]
    square = near[0] & near[1] & (k <= q)
    assert int(square.sum()) == {"v2": 62_464, "v3": 52_354}[version]
    images = {"row_mask": (k <= q) & (q - k <= 32), "col_mask": (k <= q) & (q % 32 == k % 32)}
    whole = {}
    for name, image in (images | {"conv_mask": square}).items():
        whole[f"transformer.{name}"] = torch.ones(1152, 1152, dtype=torch.bool).tril()
        whole[f"transformer.{name}"][128:, 128:] = image
    return whole


def set_last(name):
    return lambda weights: weights[name].__setitem__((-1, TEXT), 1)


@pytest.mark.parametrize(
    ("depth", "columns", "last"), [(24, 6, "square"), (64, 16, "square"), (6, 2, "column"), (1, 0, "square")]
)
def test_kinds_of_layers(depth, columns, last):
    kinds = RudalleConfig(depth=depth).kinds
    assert (kinds.count("column"), kinds[-1]) == (columns, last)
    assert kinds.count("square") == int(last == "square")


def test_inspection(tmp_path):
    weights = make_weights("v2")
    report = inspect_checkpoint(InspectCheckpointArgs(save(tmp_path, weights)))
    assert (report["family"], report["kind"], report["fits"]) == ("ruDALL-E", "transformer", True)
    assert report["sizes"]["version"] == "v2"
    assert "Apache-2.0" in report["license"]
    assert len(report["ignored"]) == 3
    path = save(tmp_path, weights | {"to_logits.0.bias": torch.ones(WIDTH, dtype=torch.bool)})
    report = inspect_checkpoint(InspectCheckpointArgs(path))
    assert not report["fits"]
    assert report["wrong_dtype"] == ["final.1.bias: torch.bool, not torch.float32"]


LAYER = "transformer.layers.1"
REFUSED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "a missing tensor": (lambda w: w.pop(f"{LAYER}.mlp.dense_4h_to_h.bias"), r"lacks 1 .*layers\.1\.mlp"),
    "half a sandwich": (lambda w: w.pop(f"{LAYER}.before_second_addition_layernorm.bias"), "norm_out"),
    "columns that are not rows": (
        lambda w: w.update({"image_col_embeddings.weight": torch.zeros(5, WIDTH)}),
        "wrong shape.*column_position",
    ),
    "whole numbers": (
        lambda w: w.update({n: t.long() for n, t in w.items()}),
        "wrong dtype.*int64, not torch.float32",
    ),
    "an infinite number": (lambda w: w["to_logits.1.bias"].fill_(torch.inf), "infinite"),
    "no mask": (lambda w: w.pop("transformer.conv_mask"), "lacks conv_mask"),
    "a mask of another size": (lambda w: w.update({"transformer.row_mask": torch.ones(3, 3)}), "neither"),
    "a mask of neither version": (set_last("transformer.conv_mask"), "neither"),
    "a row mask of its own": (set_last("transformer.row_mask"), "neither"),
    "another depth": (lambda w: [w.pop(n) for n in list(w) if ".layers.3." in n], "heads are unknown"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    make, message = REFUSED[case]
    weights = make_weights("v3")
    make(weights)
    with pytest.raises(ValueError, match=message):
        load_transformer(save(tmp_path, weights))
