"""A folder of GLIDE's published files: small files of their layout, opened and sampled by the command."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.pipelines.glide import GLIDE
from dalle.pretrained.glide_clip import NoisedCLIPScorer
from dalle.pretrained.inspect import describe_checkpoint
from dalle.pretrained.load import load_noised_clip
from dalle.text.external.gpt2 import load_gpt2_tokenizer
from tests.helpers.glide import unet
from tests.helpers.refusals import assert_refused
from tests.pretrained.test_glide_clip import WIDTH, make_tower

MERGES = ("Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e d", "re d")
"""GPT-2's first seven, and two."""
VOCAB = 256 + len(MERGES) + 1
TEXT = {"text_width": 64, "text_vocab": VOCAB, "text_len": 16, "caption_dropout": 0.2}
SHAPE = {"head_width": 64, "attention": (32,)}


def published(size: int, seed: int, channel_mult: tuple[int, ...], **fields) -> dict[str, torch.Tensor]:
    """The tensors of a U-Net, whose names are those of the release."""
    return unet(size, seed, channel_mult=channel_mult, **TEXT | SHAPE | fields).state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All that OpenAI publishes, 64 x 64 and 128 x 128 pixels, and the vocabulary."""
    folder = tmp_path_factory.mktemp("glide")
    for seed, (ending, inpainting) in enumerate((("", False), ("_inpaint", True))):
        base = published(64, seed, (1, 2), inpainting=inpainting)
        torch.save(base, folder / f"base{ending}.pt")
        larger = published(128, 2 + seed, (1, 1, 2), inpainting=inpainting, low_resolution=True)
        torch.save(larger, folder / f"upsample{ending}.pt")
    tables = {"w_t": (1000, WIDTH), "patch_proj": (WIDTH, 3, 32, 32)}
    torch.save(make_tower(5, **tables), folder / "clip_image_enc.pt")
    torch.save(make_tower(9, w_voc=(49408, WIDTH)), folder / "clip_text_enc.pt")
    with gzip.open(folder / "vocab.bpe.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder


class TestVocabulary:
    def test_ids_are_gpt2s(self, folder):
        """Those of its encoder.json, typed by hand; captions are in lower case."""
        text = load_gpt2_tokenizer(folder / "vocab.bpe.gz")
        known = {"!": 0, "a": 64, " ": 220, "\n": 198, "~": 93, " t": 256, " a": 257, "he": 258, " the": 262}
        assert {piece: text.encode(piece)[0] for piece in known} == known
        assert text.encode("The red") == [83, 258, 220, 260 + 4]
        assert text.encode("THE red") == text.encode("the red")
        assert text.decode(text.encode("a né")) == "a né"
        assert text.vocab_size == VOCAB
        cased = load_gpt2_tokenizer(folder / "vocab.bpe.gz", lowercase=False)
        assert cased.encode("A") == [32]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("vocab.bpe", b"a b c\n", "is no vocab.bpe of GPT-2"),
            ("vocab.bpe", b"", "is no vocab.bpe of GPT-2"),
            ("vocab.bpe", b"zz b\n", "needs 'zz', which its vocabulary lacks"),
            ("vocab.bpe.gz", b"a b\n", "cannot be unpacked"),
            ("vocab.bpe.gz", gzip.compress(b"a b\n")[:-9], "cannot be unpacked"),
        ],
    )
    def test_a_damaged_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_gpt2_tokenizer(tmp_path / name)


@pytest.mark.slow
class TestScorer:
    def test_its_gradient_is_that_of_a_hundred_cosines(self, folder):
        image, text = load_noised_clip(folder / "clip_image_enc.pt", folder / "clip_text_enc.pt")
        scorer = NoisedCLIPScorer(image, text)
        start, end, red = 49406, 49407, 736
        ids = torch.tensor([[start, red, end, 0, 0, 0, 0, 0, 0]])
        vector = text(ids, torch.tensor([3]))
        x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        times = torch.tensor([3, 900])
        torch.testing.assert_close(scorer.log_prob("red")(x, times), 100 * (image(x, times) @ vector[0]))
        cosines = image(2 * x - 1, torch.zeros(2)) @ vector[0]
        torch.testing.assert_close(scorer.score(x, "red"), cosines)
        assert scorer.score(x, "red").tolist() != scorer.score(x, "a blue square").tolist()
        assert scorer.score(torch.rand(1, 3, 30, 30), "red").shape == (1,)


def test_the_files_are_opened_as_one_model(folder: Path) -> None:
    plain, inpainting = (GLIDE.from_pretrained(folder, inpainting=value) for value in (False, True))
    assert (plain.base.config.inpainting, inpainting.upsampler.config.inpainting) == (False, True)
    assert (plain.base.config.image_size, plain.image_size, plain.text.vocab_size) == (64, 128, VOCAB)
    assert (plain.base.config.diffusion.schedule, plain.upsampler.config.diffusion.schedule) == (
        "cosine",
        "linear",
    )
    state = torch.load(folder / "upsample_inpaint.pt", weights_only=True)
    assert torch.equal(inpainting.upsampler.out[2].weight, state["out.2.weight"])
    assert isinstance(plain.scorer, NoisedCLIPScorer)


def test_a_folder_without_some_of_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base_inpaint.pt").symlink_to(folder / "base_inpaint.pt")
    with pytest.raises(ValueError, match=r"lacks the vocabulary .* put GLIDE's vocab\.bpe\.gz there"):
        GLIDE.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("\n".join(MERGES), encoding="utf-8")
    model = GLIDE.from_pretrained(tmp_path)
    assert (model.upsampler, model.scorer, model.base.config.inpainting) == (None, None, True)
    (tmp_path / "base.pt").symlink_to(folder / "clip_text_enc.pt")
    with pytest.raises(ValueError, match="not a published diffusion"):
        GLIDE.from_pretrained(tmp_path)


def test_inspect_checkpoint_knows_them(folder: Path) -> None:
    report = describe_checkpoint(folder)
    assert {name: one["family"].split()[0] for name, one in report.items()} == {
        "base": "GLIDE",
        "base_inpaint": "GLIDE",
        "upsample": "GLIDE",
        "upsample_inpaint": "GLIDE",
        "clip_image_enc": "image",
        "clip_text_enc": "text",
    }
    assert all(one["fits"] for one in report.values())


class TestCommands:
    FAST = ("--steps", "2", "--upsample-steps", "2", "--num-images", "1", "--device", "cpu")
    FAST += ("--precision", "fp32", "--prompt", "a red cross")

    @pytest.mark.slow
    def test_one_command_samples_from_them(self, folder, script, tmp_path):
        done = script("sample", "--model", folder, *self.FAST, "--clip-guidance", "1", "--out", "out")
        assert done.code == 0, done.err
        assert Image.open(tmp_path / "out" / "00.png").size == (128, 128)
        record = json.loads((tmp_path / "out" / "sample.json").read_text())
        settings = {"steps": 2, "guidance": 3.0, "sampler": "ancestral", "clip_guidance": 1.0}
        assert settings.items() <= record.items()
        assert (record["best_of"], len(record["images"])) == (1, 1)
        assert -1 <= record["images"][0]["score"] <= 1

    @pytest.mark.slow
    def test_inpainting_by_the_inpainting_models(self, folder, script, tmp_path):
        pixels = np.random.default_rng(0).integers(256, size=(128, 128, 3), dtype=np.uint8)
        mask = np.zeros((128, 128), np.uint8)
        mask[40:90, 30:70] = 255
        Image.fromarray(pixels).save(tmp_path / "image.png")
        Image.fromarray(mask).save(tmp_path / "mask.png")
        words = ("--inpaint", "image.png", "--mask", "mask.png", "--sampler", "ddim", "--out", "out")
        done = script("sample", "--model", folder, *self.FAST, *words)
        assert done.code == 0, done.err
        found = np.asarray(Image.open(tmp_path / "out" / "00.png"))
        assert np.array_equal(found[mask == 0], pixels[mask == 0])
        assert not np.array_equal(found[mask > 0], pixels[mask > 0])

    def test_mistakes(self, folder, chain, script):
        sample = ("--model", folder, *self.FAST)
        for words, message in (
            ((*sample, "--temperature", "0.5"), "--temperature is not for a GLIDE"),
            ((*sample, "--init-image", folder / "a.png"), "no image at"),
            ((*sample, "--log-likelihood"), "--log-likelihood is not for a GLIDE"),
            ((*sample, "--int8"), "int8 is for transformers"),
            ((*sample, "--inpaint", "a.png"), "--inpaint and --mask need each other"),
            (("--model", chain / "model", *self.FAST), "--steps is not for a DALLE"),
        ):
            assert_refused(script("sample", *words), message)
        for words, message in (
            (("--metrics", "transformer"), "is a GLIDE, without tokens: it has no metrics transformer"),
            (
                ("--metrics", "shapes", "--diffusion.steps", "1001", "--best-of", "1"),
                "steps must be 2 to 1000",
            ),
        ):
            assert_refused(script("evaluate", "--model", folder, "--device", "cpu", *words), message)
