"""Metrics of models against independent formulas and hand cases: dVAE, transformer, bound, CLIP, best of
N."""

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.dvae import DVAE, DVAEConfig
from dalle.dvae.losses import logit_laplace_log_prob
from dalle.dvae.metrics import codebook_usage
from dalle.dvae.model import map_pixels
from dalle.evals import best_of_n as pool
from dalle.evals import clip_score, likelihood, zero_shot
from dalle.evals import reconstruction as dvae
from dalle.evals import typographic_attack as typographic
from dalle.evals.best_of_n import best_of_n, best_probabilities
from dalle.evals.psnr_ssim import psnr, ssim
from dalle.evals.retrieval import retrieval
from dalle.evals.running_mean import MeanMetric
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.losses import log_likelihood
from dalle.types import Embedder


@pytest.fixture(scope="module")
def image_tokenizer() -> DVAE:
    torch.manual_seed(0)
    config = DVAEConfig(widths=(8, 8), blocks_per_group=1, downsample_factor=2, vocab_size=6, codebook_dim=4)
    return DVAE(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def stream() -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(
        depth=1, heads=1, head_dim=8, text_len=5, grid=(8, 8), text_vocab=9, image_vocab=6, conv_kernel=3
    )
    model = Transformer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.to_logits.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    levels = torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return levels / 255


class TestDVAE:
    def test_every_number_is_that_of_the_whole_set_whatever_the_batches(self, image_tokenizer, pixels):
        found = dvae.run(image_tokenizer, pixels.split([1, 4]))
        tokens = image_tokenizer.encode(pixels)
        through = image_tokenizer.decode(tokens)
        codes = torch.nn.functional.one_hot(tokens.view(5, 8, 8), 6).permute(0, 3, 1, 2).float()
        mu, log_b = image_tokenizer.reconstruct(codes)
        nats = -logit_laplace_log_prob(map_pixels(pixels), mu, log_b).mean()
        share = torch.bincount(tokens.flatten(), minlength=6).double() / tokens.numel()
        used = share[share > 0]
        q = image_tokenizer.codebook_logits(pixels).softmax(1).double()
        wanted = {
            "nats_per_pixel_value": nats,
            "kl": (q * (q * 6).log()).sum(1).mean(),
            "psnr": psnr(pixels, through).mean(),
            "ssim": ssim(pixels, through).mean(),
            "mae": (pixels - through).abs().mean(),
            "codebook_used": len(used),
            "codebook_dead_frac": 1 - len(used) / 6,
            "perplexity": (-(used * used.log()).sum()).exp(),
            "images": 5,
        }
        assert found == {
            name: pytest.approx(float(value), rel=1e-5, abs=1e-6) for name, value in wanted.items()
        }

    def test_usage_of_codes_all_the_same_and_all_alike(self):
        usage = {name: value.item() for name, value in codebook_usage(torch.tensor([0, 7, 0, 0])).items()}
        assert usage == {"codebook_used": 1, "codebook_dead_frac": 0.75, "perplexity": 1}
        assert codebook_usage(torch.full((4,), 3))["perplexity"].item() == pytest.approx(4)

    def test_a_distance_beside_and_a_tokenizer_without_likelihood(self, image_tokenizer, pixels):
        class Plain:
            downsample_factor, vocab_size = image_tokenizer.downsample_factor, image_tokenizer.vocab_size
            encode, decode = staticmethod(image_tokenizer.encode), staticmethod(image_tokenizer.decode)

        found = dvae.run(Plain(), [pixels], lpips=lambda a, b: torch.arange(5))
        assert found["lpips"] == 2
        assert "nats_per_pixel_value" not in found

    def test_no_images_are_refused(self, image_tokenizer):
        with pytest.raises(ValueError, match="nothing to measure"):
            dvae.run(image_tokenizer, [])


class TestTransformer:
    def ids(self, stream: Transformer, captions: Sequence[list[int]]) -> Tensor:
        rng = torch.Generator().manual_seed(2)
        image = torch.randint(6, (len(captions), 64), generator=rng)
        return stream.layout.pack(stream.layout.pad_text(captions), image)

    def test_nats_are_over_all_tokens_and_not_means_of_batches(self, stream):
        ids = self.ids(stream, [[1], [1, 2, 3, 4], [5, 6]])
        found = likelihood.nats_per_token(stream, ids.split([1, 2]))
        log_p = stream(ids).log_softmax(2).gather(2, ids[..., None])[..., 0].double()
        words = sum(
            log_p[row, : count + 1].sum() for row, count in enumerate((1, 4, 2))
        )  # and the pad that ends it
        assert found["text_tokens"] == 2 + 5 + 3
        assert found["image_tokens"] == 3 * 64
        assert found["text_loss"] == pytest.approx(float(-words / 10), rel=1e-5)
        assert found["image_loss"] == pytest.approx(float(-log_p[:, 5:].mean()), rel=1e-5)
        assert found["loss"] == pytest.approx(found["text_loss"] / 8 + 7 / 8 * found["image_loss"])

    def test_a_model_that_knows_nothing_has_the_logarithm_of_its_choices(self):
        model = Transformer(
            TransformerConfig(1, 1, 8, text_len=5, grid=(8, 8), text_vocab=9, image_vocab=6, conv_kernel=3)
        )
        found = likelihood.nats_per_token(model.eval(), [self.ids(model, [[1, 2], [3]])])
        assert found["text_loss"] == pytest.approx(math.log(9 + 1), rel=1e-5)
        assert found["image_loss"] == pytest.approx(math.log(6), rel=1e-5)

    def test_no_pairs_are_refused(self, stream):
        with pytest.raises(ValueError, match="no pairs"):
            likelihood.nats_per_token(stream, [])


class TestBound:
    @pytest.mark.parametrize(
        ("mu", "log_b"), [(0.0, -1.0), (-3.0, -4.0), (2.5, 0.5), (0.7, -9.0), (-40.0, -3.0)]
    )
    def test_the_probabilities_of_256_values_add_up_to_1(self, mu, log_b):
        values = torch.arange(256) / 255
        one = torch.ones(256)
        mass = likelihood.log_mass(values, mu * one, log_b * one)
        assert mass.exp().sum().item() == pytest.approx(1, abs=1e-9)
        assert not mass.isnan().any()

    def test_the_mass_of_a_value_is_the_density_summed_over_its_bin(self):
        mu, log_b = torch.tensor(0.3), torch.tensor(-1.2)
        for level in (1, 60, 128, 147, 254):
            edges = 0.1 + 0.8 * torch.linspace((level - 0.5) / 255, (level + 0.5) / 255, 20001).double()
            density = logit_laplace_log_prob(edges, mu.double(), log_b.double()).exp()
            wanted = torch.trapezoid(density, edges).log()
            found = likelihood.log_mass(torch.tensor(level / 255), mu, log_b)
            assert found.item() == pytest.approx(float(wanted), abs=1e-6)

    def test_both_bounds_by_their_formula(self, image_tokenizer, stream, pixels):
        text = stream.layout.pad_text([[1], [2, 3], [4], [], [5, 6, 7, 8]])
        pairs = list(zip(pixels.split([2, 3]), text.split([2, 3]), strict=True))
        found = likelihood.bits_per_dim(image_tokenizer, stream, pairs, seed=4)
        tokens = image_tokenizer.encode(pixels)
        mu, log_b = image_tokenizer.decoder(tokens.view(-1, 8, 8)).chunk(2, dim=1)
        image = -likelihood.log_mass(pixels, mu, log_b).sum() / 5
        ids = stream.layout.pack(text, tokens)
        nats = -stream(ids).log_softmax(2).gather(2, ids[..., None])[
            ..., 0
        ].double() * stream.layout.loss_mask(ids)
        total = float(image + nats.sum() / 5)
        assert found["argmax"]["entropy_nats"] == 0
        assert found["argmax"]["bits_per_dim"] == pytest.approx(total / math.log(2) / 768, rel=1e-6)
        given = total - found["argmax"]["text_nats"]
        assert found["argmax"]["bits_per_dim_given_caption"] == pytest.approx(
            given / math.log(2) / 768, rel=1e-6
        )
        q = image_tokenizer.codebook_logits(pixels).softmax(1)
        entropy = float(-(q * q.log()).sum() / 5)
        assert found["sampled"]["entropy_nats"] == pytest.approx(entropy, rel=1e-5)
        assert likelihood.bits_per_dim(image_tokenizer, stream, pairs, seed=4) == found
        assert likelihood.bits_per_dim(image_tokenizer, stream, pairs, seed=5)["sampled"] != found["sampled"]

    def test_it_is_a_bound_where_the_likelihood_can_be_summed(self, image_tokenizer):
        """Two positions of six codes: all 36 token streams, added up, against both bounds."""
        torch.manual_seed(3)
        config = TransformerConfig(
            1, 1, 8, text_len=3, grid=(1, 2), text_vocab=9, image_vocab=6, conv_kernel=1, sparse=False
        )
        model = Transformer(config).eval().requires_grad_(False)
        torch.nn.init.normal_(model.to_logits.weight, std=0.5)
        image = torch.randint(256, (1, 3, 2, 4)) / 255
        text = model.layout.pad_text([[1, 2]])
        tokens = torch.tensor(list(itertools.product(range(6), repeat=2)))
        mu, log_b = image_tokenizer.decoder(tokens.view(-1, 1, 2)).chunk(2, dim=1)
        each = likelihood.log_mass(image.expand(36, -1, -1, -1), mu, log_b).sum((1, 2, 3))
        of_text, of_image = log_likelihood(model, model.layout.pack(text.expand(36, -1), tokens))
        exact = float(-(each + of_text + of_image).logsumexp(0)) / math.log(2) / 24
        runs = [likelihood.bits_per_dim(image_tokenizer, model, [(image, text)], seed) for seed in range(40)]
        assert runs[0]["argmax"]["bits_per_dim"] >= exact
        assert np.mean([one["sampled"]["bits_per_dim"] for one in runs]) >= exact


class Table:
    """An Embedder by hand: an image is its first pixel's color, a caption is looked up by its last word."""

    WORDS: ClassVar = {
        "red": (1.0, 0, 0),
        "green": (0, 1.0, 0),
        "blue": (0, 0, 1.0),
        "grey": (0.577350, 0.577350, 0.577350),
    }

    def embed_images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(pixels[:, :, 0, 0], dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self.WORDS[one.rstrip(".").split()[-1]] for one in captions])


def plain(*colors: Sequence[float], side: int = 32) -> Tensor:
    return torch.tensor(colors)[:, :, None, None].expand(-1, -1, side, side).contiguous()


RED, GREEN, BLUE = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)


class TestCLIP:
    def test_our_scorers_embed(self, dalle, prompt):
        scorer = dalle.scorer
        assert isinstance(scorer, Embedder)
        images = torch.rand(3, 3, 32, 32)
        vectors, captions = scorer.embed_images(images), scorer.embed_captions([prompt, prompt])
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
        assert torch.allclose(vectors @ captions[0], scorer.score(images, prompt))

    def test_clip_score_is_hessels(self):
        batches = [(plain(RED, GREEN), ["red", "blue"]), (plain(BLUE), ["grey"])]
        found = clip_score.run(Table(), batches)
        assert found["cosine"] == pytest.approx((1 + 0 + 3**-0.5) / 3, abs=1e-6)
        assert found["clip_score"] == pytest.approx(2.5 * found["cosine"])

    def test_a_cosine_below_zero_scores_zero(self):
        opposed = Table()
        opposed.WORDS = {"red": (-1.0, 0, 0)}
        assert clip_score.run(opposed, [(plain(RED), ["red"])]) == {"cosine": -1, "clip_score": 0}
        with pytest.raises(ValueError, match="1 images with 2 captions"):
            clip_score.run(Table(), [(plain(RED), ["red", "red"])])

    def test_classes_and_templates(self):
        classes = zero_shot.class_vectors(Table(), ["red", "green", "blue"], ["{}", "a photo of {}."])
        assert torch.allclose(classes, torch.eye(3))
        ranked = zero_shot.predictions(Table(), plain(RED, (0.2, 0.9, 0.1), (0.5, 0.6, 0.4)), classes)
        assert ranked.tolist() == [[0, 1, 2], [1, 0, 2], [1, 0, 2]]
        assert zero_shot.accuracy(ranked, torch.tensor([0, 1, 2])) == {
            "acc_top_1": 2 / 3,
            "acc_chance": 1 / 3,
        }
        for names, templates, said in (
            (["red"], ["{}"], "two or more class names"),
            (["red", "red"], ["{}"], "each once"),
            (["red", "blue"], ["a photo"], "once"),
            (["red", "blue"], [], "one or more"),
        ):
            with pytest.raises(ValueError, match=said):
                zero_shot.class_vectors(Table(), names, templates)

    def test_written_words_are_followed_by_one_who_reads(self):
        class Reader(Table):
            """Takes an image with a white label for the word that a hand wrote there: the next class."""

            def embed_images(self, pixels: Tensor) -> Tensor:
                white = (pixels.amin(1) > 0.95).float().mean((1, 2)) > 0.01
                own = super().embed_images(pixels[:, :, -1:, -1:])
                return torch.where(white[:, None], own.roll(1, dims=1), own)

        names, classes = ["red", "green"], torch.eye(3)[:2]
        batches = [
            (plain(RED, GREEN, side=96), torch.tensor([0, 1])),
            (plain(RED, side=96), torch.tensor([0])),
        ]
        blind = typographic.run(Colors(), batches, names, classes)
        assert blind == {"acc_clean": 1, "acc_attacked": 1, "attack_success": 0, "attack_success_clean": 0}
        classes = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
        found = typographic.run(Reader(), batches[1:], names, classes)
        assert found == {"acc_clean": 1, "acc_attacked": 0, "attack_success": 1, "attack_success_clean": 0}

    def test_the_word_is_written_within_the_image_and_by_the_seed(self):
        image = plain(BLUE, side=64)
        one, again = (typographic.write_words(image, ["iPod"], np.random.default_rng(3)) for _ in range(2))
        other = typographic.write_words(image, ["iPod"], np.random.default_rng(4))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        dark = (one.amax(1) < 0.2).float().mean().item()
        assert 0.005 < dark < 0.2
        assert (one == image).float().mean() > 0.6


class Colors(Table):
    """Sees the most saturated corner: a label in a corner does not hide the image."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        corners = pixels[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
        spread = corners.amax(1) - corners.amin(1)
        chosen = corners[torch.arange(len(pixels)), :, spread.argmax(1)]
        return torch.nn.functional.normalize(chosen, dim=1)


class TestRetrieval:
    def test_a_hand_case_with_several_captions(self):
        images = torch.eye(3)
        captions = torch.tensor([[0.9, 0.1, 0], [0.1, 0.8, 0], [0.7, 0.2, 0.1], [0.1, 0.1, 0.9]])
        found = retrieval(images, captions, [0, 0, 1, 2], ks=(1, 2))
        assert found["image_to_text_acc"] == {
            "R@1": 2 / 3,
            "R@2": 1.0,
        }  # image 1: 0.8 of a wrong one before 0.2
        assert found["text_to_image_acc"] == {"R@1": 0.5, "R@2": 1.0}

    def test_the_shares_are_those_of_sorting(self):
        rng = torch.Generator().manual_seed(0)
        images, captions = torch.randn(40, 8, generator=rng), torch.randn(40, 8, generator=rng)
        found = retrieval(images, captions, range(40))
        cosines = images @ captions.T
        for k in (1, 5, 10):
            best = cosines.topk(k, dim=1).indices
            assert found["image_to_text_acc"][f"R@{k}"] == pytest.approx(
                (best == torch.arange(40)[:, None]).any(1).float().mean().item()
            )
            best = cosines.topk(k, dim=0).indices
            assert found["text_to_image_acc"][f"R@{k}"] == pytest.approx(
                (best == torch.arange(40)).any(0).float().mean().item()
            )

    def test_ties_are_no_merit(self):
        same = torch.ones(20, 4)
        for shares in retrieval(same, same, range(20)).values():
            assert set(shares.values()) == {0.0}

    def test_a_image_without_a_caption_is_refused(self):
        with pytest.raises(ValueError, match="must have a caption"):
            retrieval(torch.eye(3), torch.eye(3), [0, 1, 1])
        with pytest.raises(ValueError, match="one owner each"):
            retrieval(torch.eye(3), torch.eye(3), [0, 1])


class TestBestOfN:
    def test_best_probabilities_are_those_of_every_choice(self):
        for m, n in ((5, 1), (5, 2), (6, 3), (4, 4)):
            firsts = [min(choice) for choice in itertools.combinations(range(m), n)]
            wanted = np.bincount(firsts, minlength=m) / len(firsts)
            assert np.allclose(best_probabilities(m, n), wanted)

    def test_512_candidates_are_no_trouble(self):
        assert best_probabilities(512, 256).sum() == pytest.approx(1)
        assert best_probabilities(512, 512)[0] == 1
        assert pool.sizes(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
        assert pool.sizes(6) == [1, 2, 4, 6]

    def test_the_curve_is_the_mean_over_every_choice(self):
        rng = np.random.default_rng(0)
        scores, values = rng.random((2, 5)), rng.random((2, 5))
        found = best_of_n(scores, values, (1, 2, 3, 5))
        for n, value in found.items():
            kept = [
                values[row, max(choice, key=lambda i: scores[row, i])]
                for row in range(2)
                for choice in itertools.combinations(range(5), n)
            ]
            assert value == pytest.approx(np.mean(kept))
        assert best_of_n(scores)[1] == pytest.approx(scores.mean())
        assert best_of_n(scores)[5] == pytest.approx(scores.max(1).mean())

    def test_equal_scores_share(self):
        assert best_of_n(np.zeros((1, 4)), np.array([[1.0, 0, 0, 0]])) == pytest.approx(
            {1: 0.25, 2: 0.25, 4: 0.25}
        )

    def test_what_cannot_be_is_refused(self):
        for scores, values, said in (
            (np.zeros((2, 3)), np.zeros((2, 4)), "one shape"),
            (np.zeros((0, 3)), None, "one shape"),
            (np.full((1, 2), np.nan), None, "not finite"),
        ):
            with pytest.raises(ValueError, match=said):
                best_of_n(scores, values)
        with pytest.raises(ValueError, match="n must be 1 to 3"):
            best_probabilities(3, 4)
        with pytest.raises(ValueError, match="one candidate or more"):
            pool.sizes(0)


def test_means_weigh_samples_and_not_batches():
    means = MeanMetric()
    means.add({"a": torch.tensor([1.0])})
    means.add({"a": torch.tensor([4.0, 7.0, 8.0])})
    assert means.values() == {"a": 5}
