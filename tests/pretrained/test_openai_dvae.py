"""OpenAI's dVAE: files as OpenAI's own modules are pickled, read back into ours with equal outputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.commands.encode_images import take_image_tokenizer
from dalle.dvae import DVAE
from dalle.hub.registry import weights_hash
from dalle.pretrained.family import DetectedCheckpoint, compare_keys, meta_init
from dalle.pretrained.load import detect_checkpoint, load_image_tokenizer
from dalle.pretrained.openai_dvae import FAMILY
from dalle.types import ImageTokenizer

SIZES = {"n_hid": 8, "vocab_size": 24, "n_blk_per_group": 2}


@pytest.fixture(scope="module")
def released():
    return pytest.importorskip(
        "dall_e", reason="OpenAI's package dall-e, the golden reference, is not installed"
    )


@pytest.fixture(scope="module")
def halves(released) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"encoder": released.Encoder(**SIZES), "decoder": released.Decoder(n_init=12, **SIZES)}


def write(halves: dict[str, nn.Module], folder: Path, **options) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in halves.items():
        torch.save(module, folder / f"{name}.pkl", **options)
    return folder


def equal(model: DVAE, halves: dict[str, nn.Module], released) -> None:
    pixels = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    tokens = halves["encoder"](released.map_pixels(pixels)).argmax(dim=1)
    codes = F.one_hot(tokens, 24).permute(0, 3, 1, 2).float()
    images = released.unmap_pixels(torch.sigmoid(halves["decoder"](codes)[:, :3]))
    assert torch.equal(model.codebook_logits(pixels), halves["encoder"](released.map_pixels(pixels)))
    assert torch.equal(model.encode(pixels), tokens.flatten(1))
    assert torch.equal(model.decoder(codes), halves["decoder"](codes))
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 3)), images)


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_as_published(tmp_path: Path, halves, released, zipped: bool) -> None:
    write(halves, tmp_path, _use_new_zipfile_serialization=zipped)
    model = load_image_tokenizer(tmp_path)
    assert isinstance(model, ImageTokenizer)
    assert (model.downsample_factor, model.vocab_size) == (8, 24)
    assert not any(p.requires_grad for p in model.parameters())
    equal(model, halves, released)


LAYOUTS: dict[str, Callable[[dict[str, nn.Module]], dict]] = {
    "both halves": lambda halves: {
        f"{h}.{n}": t for h, m in halves.items() for n, t in m.state_dict().items()
    },
    "as DALLE-pytorch": lambda halves: {
        f"{h[:3]}.{n}": t for h, m in halves.items() for n, t in m.state_dict().items()
    },
    "under a key": lambda halves: {
        "state_dict": {f"{h}.{n}": t for h, m in halves.items() for n, t in m.state_dict().items()}
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts(tmp_path: Path, halves, released, layout: str) -> None:
    torch.save(LAYOUTS[layout](halves), tmp_path / "dvae.pt")
    equal(load_image_tokenizer(tmp_path / "dvae.pt"), halves, released)


def test_half_precision_and_transposed_memory_become_plain_fp32(tmp_path: Path, halves) -> None:
    state = LAYOUTS["both halves"](halves)
    state = {
        name: t.half().to(memory_format=torch.channels_last) if t.ndim == 4 else t
        for name, t in state.items()
    }
    torch.save(state, tmp_path / "dvae.pt")
    model = load_image_tokenizer(tmp_path / "dvae.pt")
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())


def test_the_published_size_is_recognized() -> None:
    with meta_init():
        reference = DVAE(FAMILY.infer_config(published_shapes(), None))
    tensors = reference.state_dict()
    assert sum(name.startswith("encoder") for name in tensors) == 74
    assert sum(name.startswith("decoder") for name in tensors) == 76
    counts = [sum(p.numel() for p in half.parameters()) for half in (reference.encoder, reference.decoder)]
    assert counts == [53_786_240, 43_829_766]
    compare_keys(DetectedCheckpoint(Path("published"), FAMILY, tensors)).check("published")


def published_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"encoder.blocks.input.w": (256, 3, 7, 7), "decoder.blocks.input.w": (128, 8192, 1, 1)}
    shapes["encoder.blocks.output.conv.w"] = (8192, 2048, 1, 1)
    for group, width in enumerate((256, 512, 1024, 2048), start=1):
        for block in (1, 2):
            shapes[f"encoder.blocks.group_{group}.block_{block}.res_path.conv_4.w"] = (
                width,
                width // 4,
                1,
                1,
            )
    return shapes


def test_the_encode_stage_takes_the_folder(tmp_path: Path, halves, released) -> None:
    write(halves, tmp_path / "published")
    tokenizer, weights = take_image_tokenizer(tmp_path / "published", torch.device("cpu"))
    assert weights == weights_hash(tokenizer)
    pixels = torch.rand(1, 3, 32, 32)
    expected = halves["encoder"](released.map_pixels(pixels)).argmax(dim=1).flatten(1)
    assert torch.equal(tokenizer.encode(pixels), expected)


class TestRefusals:
    def load(self, path: Path, state: dict) -> None:
        torch.save(state, path)
        load_image_tokenizer(path)

    @pytest.fixture
    def state(self, halves) -> dict[str, torch.Tensor]:
        return dict(LAYOUTS["both halves"](halves))

    def test_one_half(self, tmp_path: Path, halves) -> None:
        folder = write({"encoder": halves["encoder"]}, tmp_path)
        with pytest.raises(ValueError, match=r"no decoder\.pkl"):
            load_image_tokenizer(folder)
        with pytest.raises(ValueError, match="only the encoder"):
            load_image_tokenizer(folder / "encoder.pkl")

    def test_a_missing_tensor(self, tmp_path: Path, state) -> None:
        del state["decoder.blocks.group_2.block_1.res_path.conv_2.b"]
        with pytest.raises(ValueError, match=r"lacks 1 tensors, first decoder\.blocks\.group_2"):
            self.load(tmp_path / "x.pt", state)

    def test_an_unknown_tensor(self, tmp_path: Path, state) -> None:
        state["encoder.blocks.extra.w"] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"unexpected.*encoder\.blocks\.extra\.w"):
            self.load(tmp_path / "x.pt", state)

    def test_another_shape(self, tmp_path: Path, state) -> None:
        name = "encoder.blocks.group_1.block_1.res_path.conv_1.w"
        state[name] = state[name].transpose(0, 1)
        with pytest.raises(ValueError, match="another shape"):
            self.load(tmp_path / "x.pt", state)

    def test_a_number_that_is_none(self, tmp_path: Path, state) -> None:
        state["encoder.blocks.input.w"] = state["encoder.blocks.input.w"] * float("nan")
        with pytest.raises(ValueError, match="NaN"):
            self.load(tmp_path / "x.pt", state)

    def test_another_gain(self, tmp_path: Path, released) -> None:
        torch.manual_seed(0)
        encoder = released.Encoder(**SIZES)
        for module in encoder.modules():
            if hasattr(module, "post_gain"):
                module.post_gain = 0.5
        write({"encoder": encoder, "decoder": released.Decoder(n_init=12, **SIZES)}, tmp_path)
        with pytest.raises(ValueError, match=r"gain of 0\.5"):
            load_image_tokenizer(tmp_path)

    def test_another_count_of_poolings(self, tmp_path: Path, released) -> None:
        encoder = released.Encoder(**SIZES)
        del encoder.blocks.group_1.pool
        write({"encoder": encoder, "decoder": released.Decoder(n_init=12, **SIZES)}, tmp_path)
        with pytest.raises(ValueError, match="2 poolings in 4 groups"):
            load_image_tokenizer(tmp_path)

    def test_somebody_elses_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match="of an unknown format, not a published image tokenizer; known are: Op"
        ):
            self.load(tmp_path / "x.pt", {"weight": torch.zeros(2)})

    def test_a_broken_one_names_itself_in_find(self, tmp_path: Path) -> None:
        (tmp_path / "encoder.pkl").write_bytes(b"")
        (tmp_path / "decoder.pkl").write_bytes(b"")
        with pytest.raises(ValueError, match=r"encoder\.pkl is empty"):
            detect_checkpoint(tmp_path)
