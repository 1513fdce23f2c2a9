"""OpenAI's dVAE: files as OpenAI's own modules are pickled, read back into ours with equal outputs."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dalle.dvae import DVAE
from dalle.hub.registry import weights_hash
from dalle.pretrained.family import DetectedCheckpoint, SkipRandomInit, compare_keys
from dalle.pretrained.load import detect_checkpoint, load_image_tokenizer
from dalle.pretrained.openai_dvae import FAMILY
from dalle.runs.inputs import load_dvae_input
from dalle.types import ImageTokenizer

SIZES = {"n_hid": 8, "vocab_size": 24, "n_blk_per_group": 2}


@pytest.fixture(scope="module")
def released():
    return pytest.importorskip("dall_e")


@pytest.fixture(scope="module")
def halves(released):
    torch.manual_seed(0)
    return {"encoder": released.Encoder(**SIZES), "decoder": released.Decoder(n_init=12, **SIZES)}


def write(halves, folder, **options):
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


def test_state_dicts(tmp_path, halves, released):
    for state in (named(halves), named(halves, 3), {"state_dict": named(halves)}):  # 3: as in DALLE-pytorch
        torch.save(state, tmp_path / "dvae.pt")
        equal(load_image_tokenizer(tmp_path / "dvae.pt"), halves, released)


def test_half_precision_and_transposed_memory_become_plain_fp32(tmp_path, halves):
    state = {n: t.half() if t.ndim == 4 else t for n, t in named(halves).items()}
    torch.save({n: t.mT.contiguous().mT if t.ndim > 1 else t for n, t in state.items()}, tmp_path / "dvae.pt")
    model = load_image_tokenizer(tmp_path / "dvae.pt")
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())


def test_the_published_size_is_recognized():
    shapes = {"encoder.blocks.input.w": (256, 3, 7, 7), "decoder.blocks.input.w": (128, 8192, 1, 1)}
    shapes["encoder.blocks.output.conv.w"] = (8192, 2048, 1, 1)
    for group, width in enumerate((256, 512, 1024, 2048), start=1):
        for block in (1, 2):
            name = f"encoder.blocks.group_{group}.block_{block}.res_path.conv_4.w"
            shapes[name] = (width, width // 4, 1, 1)
    with torch.device("meta"), SkipRandomInit():
        model = DVAE(FAMILY.infer_config(shapes, None))
    tensors = model.state_dict()
    assert [sum(name.startswith(half) for name in tensors) for half in ("encoder", "decoder")] == [74, 76]
    counts = [sum(p.numel() for p in half.parameters()) for half in (model.encoder, model.decoder)]
    assert counts == [53_786_240, 43_829_766]
    compare_keys(DetectedCheckpoint(Path("published"), FAMILY, tensors)).check("published")


def test_the_encode_stage_takes_the_folder(tmp_path, halves, released):
    tokenizer, weights = load_dvae_input(write(halves, tmp_path), torch.device("cpu"))
    assert weights == weights_hash(tokenizer)
    pixels = torch.rand(1, 3, 32, 32)
    expected = halves["encoder"](released.map_pixels(pixels)).argmax(dim=1).flatten(1)
    assert torch.equal(tokenizer.encode(pixels), expected)


INPUT, CONV = "encoder.blocks.input.w", "encoder.blocks.group_1.block_1.res_path.conv_1.w"
BIAS = "decoder.blocks.group_2.block_1.res_path.conv_2.b"
REFUSED = {
    "a missing tensor": (lambda s: s.pop(BIAS), rf"lacks 1 tensors, first {BIAS}"),
    "an unknown tensor": (lambda s: s.update({f"{INPUT}.x": s[INPUT]}), r"unexpected.*input\.w\.x"),
    "wrong shape": (lambda s: s.update({CONV: s[CONV].transpose(0, 1)}), "wrong shape"),
    "not a number": (lambda s: s.update({INPUT: s[INPUT] * torch.nan}), "NaN"),
    "another file": (lambda s: [s.pop(name) for name in list(s) if "group" in name], r"unknown format.*Op"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, halves, case):
    change, message = REFUSED[case]
    state = named(halves)
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load_image_tokenizer(tmp_path / "x.pt")


def test_one_half_is_refused(tmp_path, halves):
    folder = write({"encoder": halves["encoder"]}, tmp_path)
    for path, message in ((folder, r"no file .*decoder\.pkl"), (folder / "encoder.pkl", "only the encoder")):
        with pytest.raises(ValueError, match=message):
            load_image_tokenizer(path)
    for name in ("encoder.pkl", "decoder.pkl"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"encoder\.pkl is empty"):
        detect_checkpoint(folder)


def test_a_module_that_computes_something_else_is_refused(tmp_path, halves, released):
    encoder = released.Encoder(**SIZES)
    del encoder.blocks.group_1.pool
    write({"encoder": encoder, "decoder": halves["decoder"]}, tmp_path)
    with pytest.raises(ValueError, match="2 poolings in 4 groups"):
        load_image_tokenizer(tmp_path)
    encoder = released.Encoder(**SIZES)
    for module in encoder.modules():
        if hasattr(module, "post_gain"):
            module.post_gain = 0.5
    write({"encoder": encoder}, tmp_path)
    with pytest.raises(ValueError, match=r"gain of 0\.5"):
        load_image_tokenizer(tmp_path)
