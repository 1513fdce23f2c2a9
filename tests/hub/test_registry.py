"""Opening models: mapped weights, one hash of each file, none of unchanged weights."""

import hashlib
import os
import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle.diffusion import make_schedule
from dalle.hub.registry import LoadedModel, load_model, weights_hash, write_model_directory
from dalle.hub.weights_hash import PIECE, WeightsHash
from dalle.pipelines.dalle import DALLE
from dalle.unet import DiffusionConfig, UNet, UNetConfig

KINDS = ("dvae", "transformer", "clip")


class Operations(TorchDispatchMode):
    """Names of the operations outside of the meta device."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.names.add(func.overloadpacket.__name__)
        return result


@pytest.fixture
def folder(chain, tmp_path):
    return shutil.copytree(chain / "model", tmp_path / "model")


@pytest.fixture
def hashed(monkeypatch):
    """Names of the tensors that were hashed."""
    names, add = [], WeightsHash.add
    monkeypatch.setattr(WeightsHash, "add", lambda self, name, t: (names.append(name), add(self, name, t)))
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_opening_initializes_and_copies_nothing(folder, kind):
    with Operations() as seen:
        model = load_model(folder, kind).model
    assert not {"normal_", "uniform_", "randn", "copy_", "clone", "_to_copy"} & seen.names
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device.type for t in tensors} == {"cpu"}
    places = [tensor.data_ptr() for tensor in model.state_dict().values()]
    assert max(places) - min(places) < (folder / f"{kind}.safetensors").stat().st_size


@pytest.mark.parametrize("int8", [False, True])
def test_a_model_is_rounded_as_it_is_opened(folder, int8):
    expected = DALLE.from_pretrained(folder).to_precision("bf16", int8)
    with Operations() as seen:
        found = DALLE.from_pretrained(folder, precision="bf16", int8=int8)
    assert (found.hash, found.precision) == (expected.hash, expected.precision)
    assert "clone" not in seen.names
    for name, tensor in found.transformer.state_dict().items():
        assert torch.equal(tensor, expected.transformer.state_dict()[name])
    unrounded = load_model(folder, "transformer").model.token_embedding.weight
    assert torch.equal(found.transformer.token_embedding.weight, unrounded)


def test_a_file_is_hashed_once_until_it_changes(folder, hashed):
    one = load_model(folder, "transformer")
    number = len(hashed)
    assert number == len(one.model.state_dict())
    assert one.hash == load_model(folder, "transformer").hash
    assert len(hashed) == number
    os.utime(folder / "transformer.safetensors", (1, 1))
    load_model(folder, "transformer")
    assert len(hashed) == 2 * number


def test_the_hash_of_weights_is_remembered_until_they_change(folder, hashed):
    model = load_model(folder, "dvae").model
    first, number = weights_hash(model), len(hashed)
    with torch.no_grad():
        model.encoder.blocks.input.b += 1
    assert weights_hash(model) == weights_hash(model) != first
    assert len(hashed) == 2 * number
    with torch.no_grad():
        model.encoder.blocks.input.b -= 1
    model.load_state_dict(load_model(folder, "dvae").model.state_dict())
    assert weights_hash(model) == first


@pytest.mark.parametrize("cores", [1, 3])
def test_the_hash_is_of_pieces_in_order_whatever_the_number_of_threads(cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    large = torch.arange(PIECE + 5).remainder(251).to(torch.uint8)
    tensors = {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "large": large, "turned": torch.eye(3, 2).T}
    expected = hashlib.sha256()
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        expected.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for start in range(0, len(data), 2**24):
            expected.update(hashlib.sha256(data[start : start + 2**24]).digest())
    with WeightsHash() as found:
        for name, tensor in tensors.items():
            found.add(name, tensor)
        assert found.hexdigest() == expected.hexdigest()[:16]


def test_an_open_model_keeps_its_weights_when_another_is_saved_in_its_place(folder):
    one = load_model(folder, "dvae").model
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other = load_model(folder, "dvae").model
    with torch.no_grad():
        other.decoder.blocks.input.b += 1
    write_model_directory(folder, {"dvae": other})
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())
    assert load_model(folder, "dvae").hash == weights_hash(other)


SMALL_UNET = {
    "width": 32,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention": (),
    "image_size": 8,
    "head_width": 32,
}


@pytest.mark.parametrize(("kind", "sizes"), [("base", {}), ("upsampler", {"low_resolution": True})])
def test_a_diffusion_model_keeps_its_schedule_and_prediction(tmp_path, kind, sizes):
    diffusion = DiffusionConfig("linear", 50, "v", 0.0)
    model = UNet(UNetConfig(**SMALL_UNET, **sizes, text="none", diffusion=diffusion))
    LoadedModel(kind, model).save_pretrained(tmp_path / kind)
    found = LoadedModel.from_pretrained(tmp_path / kind)
    assert (found.kind, found.hash, found.model.config) == (kind, weights_hash(model), model.config)
    assert "diffusion.prediction v" in (tmp_path / kind / "README.md").read_text()
    assert torch.equal(found.model.schedule("10").alpha_bar, make_schedule("linear", 50, "10").alpha_bar)
    other = {"base": "upsampler", "upsampler": "base"}[kind]
    with pytest.raises(ValueError, match=f"cannot be saved as {other}; save it as {kind}"):
        write_model_directory(tmp_path / other, {other: model})
