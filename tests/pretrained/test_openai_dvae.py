"""OpenAI's dVAE: files as OpenAI's own modules are pickled, read back into ours with equal outputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle.dvae import DVAE
from dalle.hub.registry import weights_hash
from dalle.pretrained.family import DetectedCheckpoint, compare_keys, meta_init
from dalle.pretrained.load import detect_checkpoint, load_image_tokenizer
from dalle.pretrained.openai_dvae import FAMILY
from dalle.runs.inputs import load_dvae_input
from dalle.types import ImageTokenizer

SIZES = {"n_hid": 8, "vocab_size": 24, "n_blk_per_group": 2}


@pytest.fixture(scope="module")
def released():
    return pytest.importorskip(
        "dall_e", reason="OpenAI's package dall-e, the golden reference, is not installed"
    )


@pytest.fixture(scope="module")
def halves(released):
    torch.manual_seed(0)
    return {"encoder": released.Encoder(**SIZES), "decoder": released.Decoder(n_init=12, **SIZES)}


def write(halves, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in halves.items():
        torch.save(module, folder / f"{name}.pkl", **options)
    return folder


def equal(model, halves, released):
    pixels = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    tokens = halves["encoder"](released.map_pixels(pixels)).argmax(dim=1)
    codes = F.one_hot(tokens, 24).permute(0, 3, 1, 2).float()
    images = released.unmap_pixels(torch.sigmoid(halves["decoder"](codes)[:, :3]))
    assert torch.equal(model.codebook_logits(pixels), halves["encoder"](released.map_pixels(pixels)))
    assert torch.equal(model.encode(pixels), tokens.flatten(1))
    assert torch.equal(model.decoder(codes), halves["decoder"](codes))
    torch.testing.assert_close(model.decode(tokens.flatten(1), (4, 3)), images)


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_as_published(tmp_path, halves, released, zipped):
    write(halves, tmp_path, _use_new_zipfile_serialization=zipped)
    model = load_image_tokenizer(tmp_path)
    assert isinstance(model, ImageTokenizer)
    assert (model.downsample_factor, model.vocab_size) == (8, 24)
    assert not any(p.requires_grad for p in model.parameters())
    equal(model, halves, released)


def named(halves, length=None):
    return {f"{half[:length]}.{n}": t for half, m in halves.items() for n, t in m.state_dict().items()}


LAYOUTS: dict[str, Callable[[dict[str, nn.Module]], dict]] = {
    "both halves": named,
    "as DALLE-pytorch": lambda halves: named(halves, 3),
    "under a key": lambda halves: {"state_dict": named(halves)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dicts(tmp_path, halves, released, layout):
    torch.save(LAYOUTS[layout](halves), tmp_path / "dvae.pt")
    equal(load_image_tokenizer(tmp_path / "dvae.pt"), halves, released)


def test_half_precision_and_transposed_memory_become_plain_fp32(tmp_path, halves):
    state = LAYOUTS["both halves"](halves)
    state = {
        name: t.half().to(memory_format=torch.channels_last) if t.ndim == 4 else t
        for name, t in state.items()
    }
    torch.save(state, tmp_path / "dvae.pt")
    model = load_image_tokenizer(tmp_path / "dvae.pt")
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())


def test_the_published_size_is_recognized():
    shapes = {"encoder.blocks.input.w": (256, 3, 7, 7), "decoder.blocks.input.w": (128, 8192, 1, 1)}
    shapes["encoder.blocks.output.conv.w"] = (8192, 2048, 1, 1)
    for group, width in enumerate((256, 512, 1024, 2048), start=1):
        for block in (1, 2):
            name = f"encoder.blocks.group_{group}.block_{block}.res_path.conv_4.w"
            shapes[name] = (width, width // 4, 1, 1)
    with meta_init():
        model = DVAE(FAMILY.infer_config(shapes, None))
    tensors = model.state_dict()
    assert [sum(name.startswith(half) for name in tensors) for half in ("encoder", "decoder")] == [74, 76]
    counts = [sum(p.numel() for p in half.parameters()) for half in (model.encoder, model.decoder)]
    assert counts == [53_786_240, 43_829_766]
    compare_keys(DetectedCheckpoint(Path("published"), FAMILY, tensors)).check("published")


def test_the_encode_stage_takes_the_folder(tmp_path, halves, released):
    write(halves, tmp_path / "published")
    tokenizer, weights = load_dvae_input(tmp_path / "published", torch.device("cpu"))
    assert weights == weights_hash(tokenizer)
    pixels = torch.rand(1, 3, 32, 32)
    expected = halves["encoder"](released.map_pixels(pixels)).argmax(dim=1).flatten(1)
    assert torch.equal(tokenizer.encode(pixels), expected)


def changed(**tensors):
    return lambda state: state.update({name: change(state[name]) for name, change in tensors.items()})


INPUT, CONV = "encoder.blocks.input.w", "encoder.blocks.group_1.block_1.res_path.conv_1.w"
REFUSED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "a missing tensor": (
        lambda state: state.pop("decoder.blocks.group_2.block_1.res_path.conv_2.b"),
        r"lacks 1 tensors, first decoder\.blocks\.group_2",
    ),
    "an unknown tensor": (
        lambda state: state.update({"encoder.blocks.extra.w": torch.zeros(1)}),
        r"unexpected.*encoder\.blocks\.extra\.w",
    ),
    "wrong shape": (changed(**{CONV: lambda w: w.transpose(0, 1)}), "wrong shape"),
    "a number that is none": (changed(**{INPUT: lambda w: w * float("nan")}), "NaN"),
    "another program's file": (
        lambda state: state.clear() or state.update(x=torch.ones(2)),
        "unknown format.*Op",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, halves, case):
    change, message = REFUSED[case]
    state = dict(LAYOUTS["both halves"](halves))
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_image_tokenizer(tmp_path / "x.pt")


def test_one_half_is_refused(tmp_path, halves):
    folder = write({"encoder": halves["encoder"]}, tmp_path)
    for path, message in ((folder, r"no decoder\.pkl"), (folder / "encoder.pkl", "only the encoder")):
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(path)
    for name in ("encoder.pkl", "decoder.pkl"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"encoder\.pkl is empty"):
        detect_checkpoint(folder)


def another_gain(encoder):
    for module in encoder.modules():
        if hasattr(module, "post_gain"):
            module.post_gain = 0.5


def a_pooling_less(encoder):
    del encoder.blocks.group_1.pool


@pytest.mark.parametrize(
    ("change", "message"), [(another_gain, r"gain of 0\.5"), (a_pooling_less, "2 poolings in 4 groups")]
)
def test_a_module_that_computes_something_else_is_refused(tmp_path, halves, released, change, message):
    encoder = released.Encoder(**SIZES)
    change(encoder)
    write({"encoder": encoder, "decoder": halves["decoder"]}, tmp_path)
    with pytest.raises(ValueError, match=message):
        load_image_tokenizer(tmp_path)
