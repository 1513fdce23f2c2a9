"""minDALL-E: its folder and archive against a reference; its text ids against the tokenizers package."""

import io
import tarfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dalle.commands.inspect_checkpoint import InspectCheckpointArgs, inspect_checkpoint
from dalle.commands.sample import SampleArgs, sample
from dalle.pretrained.load import (
    detect_checkpoint,
    load_external_pipeline,
    load_image_tokenizer,
    load_transformer,
)
from dalle.pretrained.mindalle.model import (
    CONFIG,
    FAMILY,
    FILES,
    MERGES,
    STAGE1,
    STAGE2,
    VOCABULARY,
    MinDalleConfig,
    load_tokenizer,
)
from dalle.vqgan import VQGAN
from tests.helpers import mindalle_reference as reference
from tests.helpers.external import check_logits, check_published, check_sampling
from tests.helpers.mindalle_reference import CAPTIONS, SIDE, TEXT, write_folder
from tests.helpers.vqgan_reference import CODES

pytest.importorskip("tokenizers", reason="tokenizers is not installed: its CharBPETokenizer writes the files")

CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "sigmoid": {"gelu_use_approx": True},
    "no biases": {"attn_bias": False, "mlp_bias": False},
    "other heads": {"n_heads": 3},
}
IMAGE = torch.randint(CODES, (2, SIDE * SIDE), generator=torch.Generator().manual_seed(1))
AWKWARD = ["", "ÉCOLE  naïve\tΛΔΩΣ", "red\u200bcircle 红色的圆x", "a" * 30, "\x00\ufffd!?--'s", "snow ☃ 🎨"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("1.3B")
    write_folder(made)
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    state = write_folder(tmp_path, **CASES[case])
    model, text = load_transformer(tmp_path), load_tokenizer(tmp_path)
    tokens = model.layout.pad_text([text.encode("a red")[:TEXT], text.encode(CAPTIONS[3])[:TEXT]])
    found = model(model.layout.pack(tokens, IMAGE))
    for row in range(2):
        expected = reference.logits(state, tokens[row].tolist(), IMAGE[row].tolist()[:-1], **CASES[case])
        check_logits(found[row], *expected, model.layout)


def test_text_ids_are_those_of_its_tokenizer(folder):
    theirs, ours = reference.published_tokenizer(folder), load_tokenizer(folder)
    layout = load_transformer(folder).layout
    assert ours.vocab_size == theirs.get_vocab_size()
    for caption in [*CAPTIONS, *AWKWARD]:
        expected = theirs.encode(caption, add_special_tokens=False)
        assert layout.pad_text([ours.encode(caption)], truncate=True).tolist() == [expected.ids], caption
    assert len(ours.encode("[PAD]x")) > 2  # a special token spelled out is text
    assert ours.decode(ours.encode("A Red CIRCLE")) == "a red circle"
    assert layout.pad == theirs.token_to_id("[PAD]")


def test_sampling_and_layout(folder):
    model = load_transformer(folder)
    layout = model.layout
    check_sampling(model, layout.pad_text([[5, 6], [7] * TEXT]), IMAGE, read=SIDE + 2)
    text = layout.pad_text([[5, 6, 7]])
    assert text.tolist() == [[5, 6, 7] + [layout.pad] * (TEXT - 3)]
    mask = layout.loss_mask(layout.pack(text, IMAGE[:1]))[0, :TEXT]
    assert mask.tolist() == [False, True, True, True] + [False] * 3
    with pytest.raises(ValueError, match=f"at most {TEXT} fit"):
        layout.pad_text([[5] * (TEXT + 1)])


def pack(folder, target, top="1.3B/", change=lambda archive: None):
    with tarfile.open(target, "w:gz") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.add(file, f"{top}{file.relative_to(folder)}")
        change(archive)
    return target


def test_folder_and_archive_generate_the_same_images(folder, tmp_path):
    tokens = []
    for path in (folder, pack(folder, tmp_path / "1.3B.tar.gz"), pack(folder, tmp_path / "flat.tgz", top="")):
        model = load_external_pipeline(path)
        assert isinstance(model.dvae, VQGAN)
        generation = model.generate("a red circle", n=2, best_of=2, seed=1, batch_size=2)
        assert generation.images[0].size == (4 * SIDE, 4 * SIDE)
        tokens.append(generation.image_tokens)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    again = model.complete("a red circle", generation.images[0], rows=2, n=1, best_of=1)
    assert again.image_tokens.shape == (1, SIDE * SIDE)


def test_log_likelihood(tmp_path):
    state = write_folder(tmp_path)
    model = load_external_pipeline(tmp_path)
    found = model.log_likelihood("a red circle", IMAGE[:1])
    (tokens,) = model.text_tokens(["a red circle"]).tolist()
    of_text, of_image = reference.logits(state, tokens, IMAGE[0].tolist()[:-1])
    counted = min(TEXT - 1, len(model.text.encode("a red circle")))
    expected = of_text.log_softmax(1)[range(counted), tokens[1 : counted + 1]].sum()
    torch.testing.assert_close(found.text[0], expected)
    torch.testing.assert_close(found.image[0], of_image.log_softmax(1)[range(SIDE * SIDE), IMAGE[0]].sum())


def test_sample_and_inspect_checkpoint(folder, tmp_path):
    archive, out = pack(folder, tmp_path / "1.3B.tar.gz"), tmp_path / "out"
    sample(SampleArgs(prompt="a red circle", model=archive, best_of=2, num_images=2, out=out, device="cpu"))
    assert (out / "01.png").is_file()
    for path in (folder, archive, folder / STAGE2):
        report = inspect_checkpoint(InspectCheckpointArgs(path))
        assert (report["family"], report["kind"], report["fits"]) == ("minDALL-E", "transformer", True)
        assert "CC-BY-NC-SA" in report["license"]
        assert report["sizes"]["heads"] == 4


@pytest.mark.parametrize("text", ["stage2: {type: transformer1d, hparams: {n_heads: 24}}", "stage1: {}"])
def test_the_published_file_fits(tmp_path, text):
    """Shapes alone, under the published names, with the published config.yaml."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / VOCABULARY).write_text('{"[PAD]": 16383, "[UNK]": 16382}')
    (tmp_path / CONFIG).write_text(text)
    weights, config = reference.make_weights(30, n_layers=42), MinDalleConfig(pad=16383)
    check_published(FAMILY, tmp_path / STAGE2, weights, config, parameters=1_291_081_728)


SWELLING = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12))
SWELLING = f"a0: &a0 [x]\n{SWELLING}stage2: {{type: *a12}}\n"  # 9 to the 12th, were it written out
REFUSED = {  # a file, its text (None: no file), the message
    "biases that are switched off": (
        CONFIG,
        "stage2: {hparams: {n_heads: 4, attn_bias: false}}",
        "unexpected.*bias",
    ),
    "no heads": (CONFIG, "stage1: 1", "n_heads None"),
    "heads that are no number": (CONFIG, "stage2: {hparams: {n_heads: many}}", "n_heads 'many'"),
    "heads that do not divide": (CONFIG, "stage2: {hparams: {n_heads: 5}}", "5 heads"),
    "a switch that is none": (CONFIG, "stage2: {hparams: {n_heads: 4, mlp_bias: maybe}}", "mlp_bias 'maybe'"),
    "another kind of model": (CONFIG, "stage2: {type: igpt}", "type 'igpt'"),
    "a value that swells": (CONFIG, SWELLING, "aliases"),
    "no configuration": (CONFIG, None, r"no config\.yaml in"),
    "no YAML": (CONFIG, "a: [1\n", r"config\.yaml is not YAML"),
    "no mapping": (CONFIG, "- 1\n", "no mapping"),
    "no vocabulary": (VOCABULARY, None, "no tokenizer/bpe-16k-vocab"),
    "a vocabulary without pad": (VOCABULARY, '{"[UNK]": 0}', r"lacks \[PAD\]"),
    "no merges": (MERGES, None, "merges.txt cannot be read"),
    "merges of another file": (MERGES, "#version\nx y z\n", "merges.txt cannot be read"),
    "merges of another vocabulary": (MERGES, "ж ж\n", "merges.txt cannot be read"),
    "no image tokenizer": (STAGE1, None, "no file .*stage1_last"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    name, text, message = REFUSED[case]
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_external_pipeline(tmp_path)


@pytest.mark.parametrize(("prefix", "condition"), [("", "sos.weight"), ("stage2.", "sos")])
def test_the_transfer_to_imagenet_is_refused_by_name(tmp_path, condition, prefix):
    state = {name: t for name, t in reference.make_weights(30).items() if "txt" not in name}
    state[condition] = torch.zeros(10, 24)
    torch.save({"state_dict": {f"{prefix}{name}": t for name, t in state.items()}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"minDALL-E transferred to ImageNet.*reads no captions"):
        detect_checkpoint(tmp_path / "last.ckpt")


def member(name, content=b"x", **fields):
    def add(archive):
        info = tarfile.TarInfo(name)
        for field, value in ({"size": len(content)} | fields).items():
            setattr(info, field, value)
        archive.addfile(info, None if "size" in fields else io.BytesIO(content))

    return add


HOSTILE: dict[str, tuple[Callable, str]] = {
    "an absolute path": (member("/evil"), "leads outside"),
    "a path upward": (member("1.3B/../../evil"), "leads outside"),
    "a path of Windows": (member("..\\evil"), "leads outside"),
    "a drive of Windows": (member("C:evil"), "leads outside"),
    "a link to a file": (member("1.3B/x", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link"),
    "a hard link": (member("1.3B/x", b"", type=tarfile.LNKTYPE, linkname="1.3B/config.yaml"), "is a link"),
    "a device": (member("1.3B/x", b"", type=tarfile.CHRTYPE), "is a link or a device"),
    "a file twice": (member("1.3B/config.yaml"), "two members"),
    "a file in two places": (member("other/config.yaml"), "twice"),
    "a bomb": (member("1.3B/zeros", bytes(2**23)), "a bomb"),
    "a bomb in a header": (member("1.3B/x", pax_headers={"comment": "x" * 2**23}), "a bomb"),
    "a claim beyond any disk": (member("1.3B/zeros", size=2**50), "a bomb"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch, case):
    change, message = HOSTILE[case]
    place, folder = tmp_path / "temporary", tmp_path / "1.3B"
    place.mkdir()
    (folder / "tokenizer").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("harmless")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    hostile = pack(folder, tmp_path / "1.3B.tar.gz", change=change)
    for load in (load_external_pipeline, load_transformer, load_image_tokenizer):
        with pytest.raises(ValueError, match=message):
            load(hostile)
    assert list(place.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.3B", "1.3B.tar.gz", "temporary"]


def test_damaged_and_other_archives(folder, tmp_path):
    whole = pack(folder, tmp_path / "1.3B.tar.gz").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "cannot be unpacked"),
        (whole[:-1], "cannot be unpacked"),
        (whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], "CRC check failed"),
        (b"\x1f\x8b" + b"\x00" * 50, "cannot be unpacked"),
    ):
        (tmp_path / "broken.tar.gz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_external_pipeline(tmp_path / "broken.tar.gz")
    (tmp_path / "empty").mkdir()
    other = pack(tmp_path / "empty", tmp_path / "other.tar.gz", change=member("readme.txt"))
    with pytest.raises(ValueError, match=r"without config\.yaml"):
        load_external_pipeline(other)
