"""CLIP (Radford et al. 2021): the model, its objective, and open_clip's models (dalle/clip)."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dalle.clip import CLIP, CLIPConfig, CLIPScorer, PretrainedScorer
from dalle.clip.model import prepare_pixels
from dalle.clip.objective import CLIPObjective
from dalle.io.pickle_scan import Forbidden
from dalle.pipelines.best_of_n import TopN
from dalle.train.config import EMAConfig, OptimizerConfig
from dalle.train.optimizer import build_optimizers
from dalle.train.precision import autocast
from dalle.train.state import EMA, TrainState
from dalle.train.step import train_step
from dalle.types import Scorer
from tests.helpers.hostile import Call

VISION = {"image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1}
TEXT = {"text_len": 6, "text_vocab": 20, "text_width": 16, "text_layers": 1}
CONFIG = CLIPConfig(embed_width=8, head_dim=8, **VISION, **TEXT)


class Letters:
    """A text tokenizer of one id per letter: a is 0, b is 1, ..."""

    vocab_size = 20

    def encode(self, caption: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in caption]


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CONFIG)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("field", ["patch_size", "vision_width", "text_width"])
def test_sizes_that_do_not_divide_are_refused(field):
    with pytest.raises(ValueError, match=f"{field} 100"):
        CLIPConfig(**{field: 100})


class TestPackText:
    def test_ids_then_the_end_token_then_pads(self, model):
        """open_clip reads the state at the argmax of the ids, so the end token is the highest."""
        packed = model.pack_text([[3, 4], [], list(range(10)), [19] * 3])  # the third is cut
        assert packed.dtype == torch.int64
        assert packed[:3].tolist() == [[3, 4, 21, 20, 20, 20], [21] + [20] * 5, [0, 1, 2, 3, 4, 21]]
        assert packed.argmax(dim=1).tolist() == [2, 0, 5, 3]
        assert packed.max() == model.end == model.net.vocab_size - 1

    def test_ids_of_the_caption_count_and_no_others(self, model):
        packed = model.pack_text([[3, 4], [3, 5], [2, 4], [3, 4, 4]])
        texts = model.encode_text(packed)
        torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
        assert len({tuple(text.tolist()) for text in texts.round(decimals=4)}) == 4
        packed[0, 3:] = 7
        torch.testing.assert_close(model.encode_text(packed), texts)


class TestTowers:
    def test_images_of_another_size_are_resized_and_uint8_values_are_refused(self, model):
        large = torch.rand(2, 3, 40, 40)
        torch.testing.assert_close(model.encode_image(large).norm(dim=1), torch.ones(2))
        resized = F.interpolate(large, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
        torch.testing.assert_close(model.encode_image(large), model.encode_image(resized))
        with pytest.raises(ValueError, match="divide by 255"):
            model.encode_image(large * 255)

    def test_pixels_are_normalized_as_in_the_release(self):
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
        found = prepare_pixels(torch.full((1, 3, 4, 4), 0.5), 4)[0, :, 0, 0]
        torch.testing.assert_close(found, (0.5 - mean) / std)

    def test_the_scale_starts_at_one_over_0_07_and_is_at_most_100(self, model):
        """Radford et al., section 2.5."""
        assert model.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-4)
        with torch.no_grad():
            model.net.logit_scale.fill_(10.0)
        assert model.logit_scale().item() == 100.0


class TestObjective:
    def test_it_is_the_symmetric_cross_entropy_of_the_scaled_cosines(self, model, pixels):
        """Radford et al., Figure 3, written out."""
        text = model.pack_text([[1], [2, 3], [4]])
        loss = CLIPObjective()(model, (pixels, text), 0)
        cosines = model.encode_image(pixels) @ model.encode_text(text).T * model.net.logit_scale.exp()
        terms = [cosines[i, i] - cosines[i].logsumexp(0) for i in range(3)]
        terms += [cosines[i, i] - cosines[:, i].logsumexp(0) for i in range(3)]
        torch.testing.assert_close(loss.total, -sum(terms) / 6)
        alone = CLIPObjective()(model, (pixels[:1], text[:1]), 0)
        assert alone.total.item() == pytest.approx(0.0, abs=1e-6)
        assert alone.metrics["image_to_text_acc"] == 1.0

    def test_passes_of_a_part_of_the_batch_are_refused(self, model):
        """However a training is started, not by the command alone."""
        pixels, text = torch.rand(4, 3, 32, 32), model.pack_text([[1], [2], [3], [4]])
        config = OptimizerConfig()
        state = TrainState(model, build_optimizers(model, config), EMA(model, EMAConfig()))
        with pytest.raises(ValueError, match="set grad_accum_steps to 1"):
            train_step(state, (pixels, text), CLIPObjective(), config, "fp32", 0, passes=2)

    def test_images_without_a_caption_are_hard_negatives(self, model, pixels):
        """The cross-entropy of each caption over all six images is added to the symmetric one."""
        text, others = model.pack_text([[1], [2, 3], [4]]), pixels.flip(3)
        loss = CLIPObjective()(model, (pixels, text, others), 0)
        cosines = model.encode_text(text) @ model.encode_image(torch.cat([pixels, others])).T
        scaled = cosines * model.net.logit_scale.exp()
        more = -sum(scaled[i, i] - scaled[i].logsumexp(0) for i in range(3)) / 3
        torch.testing.assert_close(loss.total, CLIPObjective()(model, (pixels, text), 0).total + more)
        better = sum(cosines[i, i] > cosines[i, i + 3] for i in range(3)) / 3
        assert loss.metrics["hard_negative_acc"] == better

    @pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.2), ("fp16", 0.05)])
    def test_on_cuda_loss_and_gradients_are_those_of_the_cpu(self, precision, tolerance, model, pixels, cuda):
        text, found = model.pack_text([[1], [2, 3], [4]]), []
        for device, kind in ((torch.device("cpu"), "fp32"), (cuda, precision)):
            own = deepcopy(model).to(device)
            batch = [x.to(device) for x in (pixels, text, pixels.flip(3))]
            with autocast(kind, device):
                total = CLIPObjective()(own, tuple(batch), 0).total
            total.backward()
            gradients = torch.cat([p.grad.cpu().flatten() for p in own.parameters() if p.grad is not None])
            found.append((float(total.detach()), gradients))
        (expected, of_cpu), (value, of_cuda) = found
        assert value == pytest.approx(expected, rel=tolerance)
        assert (of_cuda - of_cpu).norm() < tolerance * of_cpu.norm()

    def test_both_towers_and_the_scale_learn_to_match_three_pairs(self, model):
        colors = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16)
        batch = colors, model.pack_text([[1], [2, 3], [4]])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(40):
            optimizer.zero_grad()
            CLIPObjective()(model, batch, step).total.backward()
            optimizer.step()
        for part in (model.net.visual.proj, model.net.text_projection, model.net.logit_scale):
            assert part.grad.abs().sum() > 0
        loss = CLIPObjective()(model, batch, 0)
        assert loss.metrics["image_to_text_acc"] == 1.0
        assert loss.total < 0.1

    @pytest.mark.parametrize("pool", ["class", "average"])
    def test_plain_attention_is_the_fused_one(self, pool, pixels):
        model = CLIP(replace(CONFIG, vision_pool=pool)).eval()
        fused = model.net.encode_image(prepare_pixels(pixels, 16), normalize=True)
        torch.testing.assert_close(model.encode_image(pixels), fused)


class TestScorer:
    @pytest.mark.parametrize("size", [16, 20])
    def test_a_score_is_the_cosine_with_a_gradient_for_the_pixels(self, model, size):
        pixels = torch.rand(2, 3, size, size, requires_grad=True)
        expected = model.encode_image(pixels) @ model.encode_text(model.pack_text([[1, 2]]))[0]
        scorer = CLIPScorer(model, Letters())
        assert isinstance(scorer, Scorer)
        scores = scorer.score(pixels, "bc")
        torch.testing.assert_close(scores, expected)
        scores.sum().backward()
        assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()

    def test_a_text_tokenizer_with_more_ids_is_refused(self, model, monkeypatch):
        monkeypatch.setattr(Letters, "vocab_size", 21)
        with pytest.raises(ValueError, match=r"21 ids, .* 20"):
            CLIPScorer(model, Letters())


class Brightness:
    def score(self, pixels: torch.Tensor, caption: str) -> torch.Tensor:
        return pixels.mean(dim=(1, 2, 3)).round(decimals=4)


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_the_best_comes_first_and_ties_keep_their_order(chunk):
    pixels = torch.tensor([0.2, 0.9, 0.5, 0.9])[:, None, None, None].expand(4, 3, 8, 8)
    top = TopN(3, "a", Brightness(), seed=0, best_of=4)
    for start in range(0, 4, chunk):
        part = pixels[start : start + chunk]
        top.add(torch.zeros(len(part), 16, dtype=torch.int64), part, start)
    generation = top.generation()
    assert generation.candidates == [1, 3, 2]
    assert generation.scores == pytest.approx([0.9, 0.9, 0.5])
    with pytest.raises(ValueError, match="not finite for 'a'"):
        top.add(torch.zeros(4, 16, dtype=torch.int64), pixels * torch.nan, 4)


ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """A tiny architecture named "tiny-test"."""
    folder = tmp_path_factory.mktemp("architectures")
    (folder / "tiny-test.json").write_text(json.dumps(ARCHITECTURE))
    open_clip.add_model_config(folder)


@pytest.fixture(params=["safetensors", "pt"])
def weights(request, architecture, tmp_path):
    """(file, model): random weights of the tiny architecture on disk."""
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test").eval()
    file = tmp_path / f"weights.{request.param}"
    write = torch.save if request.param == "pt" else save_file
    write({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file, model


class TestPretrainedScorer:
    def test_it_scores_as_the_model_of_the_file(self, weights):
        file, model = weights
        pixels = torch.rand(2, 3, 48, 48, requires_grad=True)
        images = model.encode_image(prepare_pixels(pixels, 32), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny-test")(["a red circle"]), normalize=True)
        scorer = PretrainedScorer("tiny-test", str(file))
        scores = scorer.score(pixels, "a red circle")
        torch.testing.assert_close(scores, (images @ text.T)[:, 0])
        scores.sum().backward()
        assert pixels.grad.abs().sum() > 0
        assert isinstance(scorer, Scorer)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.model.", "model.module._orig_mod."])
    def test_prefixes_of_wrappers_and_an_outer_dict_are_stripped(self, weights, prefix, tmp_path):
        _, model = weights
        wrapped = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": wrapped}, tmp_path / "wrapped.pt")
        found = PretrainedScorer("tiny-test", str(tmp_path / "wrapped.pt")).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        torch.save({}, tmp_path / "empty.pt")
        with pytest.raises(ValueError, match=r"empty\.pt does not hold the weights"):
            PretrainedScorer("tiny-test", str(tmp_path / "empty.pt"))

    def test_on_cuda_it_scores_as_on_the_cpu(self, weights, cuda):
        here, there = (PretrainedScorer("tiny-test", str(weights[0]), device) for device in ("cpu", cuda))
        pixels = torch.rand(2, 3, 48, 48)
        found = there.score(pixels.to(cuda), "a red circle")
        assert found.device == cuda
        torch.testing.assert_close(found.cpu(), here.score(pixels, "a red circle"), rtol=1e-4, atol=1e-4)

    def test_captions_that_are_cut_are_counted(self, weights):
        """The context of ten holds eight ids next to the start and end tokens."""
        scorer = PretrainedScorer("tiny-test", str(weights[0]))
        pixels = torch.rand(1, 3, 32, 32)
        for caption, cut in (("a " * 8, 0), ("a " * 9, 1), ("a", 1), ("a " * 30, 2)):
            scorer.score(pixels, caption)
            assert scorer.truncated == cut

    def test_a_file_of_weights_runs_no_code(self, architecture, tmp_path):
        torch.save({"state_dict": Call(Path.touch, tmp_path / "touched")}, tmp_path / "weights.pt")
        with pytest.raises(Forbidden):
            PretrainedScorer("tiny-test", str(tmp_path / "weights.pt"))
        assert not (tmp_path / "touched").exists()

    @pytest.fixture
    def no_network(self, monkeypatch):
        for name in ("socket.socket.connect", "open_clip.create_model"):
            monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a download was tried"))

    @pytest.mark.parametrize("missing", ["none.pt", "openai", "laion2b_s34b_b79k"])
    def test_nothing_is_downloaded_unless_allowed(self, no_network, missing):
        with pytest.raises(ValueError, match=f"no file {missing}.* download"):
            PretrainedScorer("ViT-B-32", missing)

    def test_an_unknown_architecture_is_named(self, weights, no_network):
        with pytest.raises(ValueError, match="'no-such'"):
            PretrainedScorer("no-such", str(weights[0]))
