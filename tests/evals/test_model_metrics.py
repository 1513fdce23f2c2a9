"""Metrics of models against independent formulas and hand cases."""

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
from dalle.dvae.model import map_pixels
from dalle.evals import clip, fid, likelihood, reconstruction
from dalle.evals.best_of_n import best_of_n, sizes
from dalle.evals.clip import retrieval
from dalle.evals.psnr_ssim import psnr, ssim
from dalle.evals.running_mean import MeanMetric
from dalle.evals.shapes_accuracy import ShapesSamples, pair_accuracy
from dalle.train.precision import copy_to_device
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.losses import log_likelihood
from dalle.types import Embedder

CONFIG = {"depth": 1, "heads": 1, "head_dim": 8, "text_vocab": 9, "image_vocab": 6}


def make_transformer(seed: int, **options) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(**CONFIG, **options)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.to_logits.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def dvae() -> DVAE:
    torch.manual_seed(0)
    config = DVAEConfig(widths=(8, 8), blocks_per_group=1, downsample_factor=2, vocab_size=6, codebook_dim=4)
    return DVAE(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    return make_transformer(1, text_len=5, grid=(8, 8), conv_kernel=3)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255


class TestReconstruction:
    def test_values_are_those_of_the_whole_set_in_any_batches(self, dvae, pixels):
        tokens = dvae.encode(pixels)
        decoded = dvae.decode(tokens)
        codes = torch.nn.functional.one_hot(tokens.view(5, 8, 8), 6).permute(0, 3, 1, 2).float()
        mu, log_b = dvae.reconstruct(codes)
        share = torch.bincount(tokens.flatten(), minlength=6).double() / tokens.numel()
        used = share[share > 0]
        q = dvae.codebook_logits(pixels).softmax(1).double()
        expected = {
            "nats_per_pixel_value": -logit_laplace_log_prob(map_pixels(pixels), mu, log_b).mean(),
            "kl": (q * (q * 6).log()).sum(1).mean(),
            "psnr": psnr(pixels, decoded).mean(),
            "ssim": ssim(pixels, decoded).mean(),
            "mae": (pixels - decoded).abs().mean(),
            "codebook_used": len(used),
            "codebook_dead_frac": 1 - len(used) / 6,
            "perplexity": (-(used * used.log()).sum()).exp(),
            "images": 5,
        }
        expected = {name: pytest.approx(float(value), rel=1e-5, abs=1e-6) for name, value in expected.items()}
        assert reconstruction.run(dvae, pixels.split([1, 4])) == expected

    def test_lpips_and_a_tokenizer_without_likelihood(self, dvae, pixels):
        class Plain:
            downsample_factor, vocab_size = dvae.downsample_factor, dvae.vocab_size
            encode, decode = staticmethod(dvae.encode), staticmethod(dvae.decode)

        report = reconstruction.run(Plain(), [pixels], lpips=lambda a, b: torch.arange(5))
        assert report["lpips"] == 2
        assert "nats_per_pixel_value" not in report


def test_nats_are_over_all_tokens_and_not_means_of_batches(transformer):
    image = torch.randint(6, (3, 64), generator=torch.Generator().manual_seed(2))
    ids = transformer.layout.pack(transformer.layout.pad_text([[1], [1, 2, 3, 4], [5, 6]]), image)
    report = likelihood.nats_per_token(transformer, ids.split([1, 2]))
    log_p = transformer(ids).log_softmax(2).gather(2, ids[..., None])[..., 0].double()
    text = sum(log_p[row, : count + 1].sum() for row, count in enumerate((1, 4, 2)))  # with the end
    assert (report["text_tokens"], report["image_tokens"]) == (2 + 5 + 3, 3 * 64)
    assert report["text_loss"] == pytest.approx(float(-text / 10), rel=1e-5)
    assert report["image_loss"] == pytest.approx(float(-log_p[:, 5:].mean()), rel=1e-5)
    assert report["loss"] == pytest.approx(report["text_loss"] / 8 + 7 / 8 * report["image_loss"])


class Features:
    """Pixels as features and as logits."""

    hash, resize = "", ""

    def __call__(self, images):
        return images.flatten(1)[:, :8], images.flatten(1)[:, :10]


def test_metrics_of_a_device_are_those_of_the_cpu(dvae, transformer, pixels, cuda):
    """In float64 on the CPU alone: Apple's MPS has none."""
    vectors = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    text = transformer.layout.pad_text([[1], [2, 3], [4], [], [5, 6, 7, 8]])
    found = []
    for device in (torch.device("cpu"), cuda):
        coder, model = copy_to_device(dvae, device), copy_to_device(transformer, device)
        images, captions, unit = pixels.to(device), text.to(device), vectors.to(device)
        ids = model.layout.pack(captions, coder.encode(images))
        stats = fid.extract_stats(Features(), [images])
        values = {
            **likelihood.nats_per_token(model, [ids]),
            **likelihood.bits_per_dim(coder, model, [(images, captions)])["sampled"],
            **reconstruction.run(coder, [images]),
            **retrieval(unit, unit.flip(0), range(5))["image_to_text_acc"],
            **clip.accuracy((unit @ unit.T).argsort(1), torch.arange(5)),
            "features": float(stats[8].gaussian().covariance.sum()),
            "inception_score": fid.inception_score(torch.cat(stats[0].logits), splits=2)[0],
        }
        found.append(values)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class TestBitsPerDim:
    @pytest.mark.parametrize(
        ("mu", "log_b"), [(0.0, -1.0), (-3.0, -4.0), (2.5, 0.5), (0.7, -9.0), (-40.0, -3.0)]
    )
    def test_probabilities_of_the_256_values_add_up_to_1(self, mu, log_b):
        ones = torch.ones(256)
        mass = likelihood.log_mass(torch.arange(256) / 255, mu * ones, log_b * ones)
        assert mass.exp().sum().item() == pytest.approx(1, abs=1e-9)

    def test_the_mass_of_a_value_is_the_integral_of_the_density(self):
        mu, log_b = torch.tensor(0.3), torch.tensor(-1.2)
        for level in (1, 60, 128, 147, 254):
            edges = 0.1 + 0.8 * torch.linspace((level - 0.5) / 255, (level + 0.5) / 255, 20001).double()
            density = logit_laplace_log_prob(edges, mu.double(), log_b.double()).exp()
            mass = likelihood.log_mass(torch.tensor(level / 255), mu, log_b)
            assert mass.item() == pytest.approx(float(torch.trapezoid(density, edges).log()), abs=1e-6)

    def test_both_bounds_by_their_formula(self, dvae, transformer, pixels):
        text = transformer.layout.pad_text([[1], [2, 3], [4], [], [5, 6, 7, 8]])
        pairs = list(zip(pixels.split([2, 3]), text.split([2, 3]), strict=True))
        report = likelihood.bits_per_dim(dvae, transformer, pairs, seed=4)
        tokens = dvae.encode(pixels)
        mu, log_b = dvae.decoder(tokens.view(-1, 8, 8)).chunk(2, dim=1)
        ids = transformer.layout.pack(text, tokens)
        log_p = transformer(ids).log_softmax(2).gather(2, ids[..., None])[..., 0].double()
        log_p = log_p * transformer.layout.loss_mask(ids)
        total = float(-likelihood.log_mass(pixels, mu, log_b).sum() - log_p.sum()) / 5
        argmax, bits = report["argmax"], math.log(2) * 768
        assert argmax["entropy_nats"] == 0
        assert argmax["bits_per_dim"] == pytest.approx(total / bits, rel=1e-6)
        given = pytest.approx((total - argmax["text_nats"]) / bits, rel=1e-6)
        assert argmax["bits_per_dim_given_caption"] == given
        q = dvae.codebook_logits(pixels).softmax(1)
        assert report["sampled"]["entropy_nats"] == pytest.approx(float(-(q * q.log()).sum() / 5), rel=1e-5)
        assert likelihood.bits_per_dim(dvae, transformer, pairs, seed=4) == report
        assert likelihood.bits_per_dim(dvae, transformer, pairs, seed=5)["sampled"] != report["sampled"]

    def test_it_is_a_bound_where_the_likelihood_can_be_summed(self, dvae):
        """Two positions of six codes: the sum over all 36 token sequences against both bounds."""
        model = make_transformer(3, text_len=3, grid=(1, 2), conv_kernel=1, sparse=False)
        image, text = torch.randint(256, (1, 3, 2, 4)) / 255, model.layout.pad_text([[1, 2]])
        tokens = torch.tensor(list(itertools.product(range(6), repeat=2)))
        mu, log_b = dvae.decoder(tokens.view(-1, 1, 2)).chunk(2, dim=1)
        each = likelihood.log_mass(image.expand(36, -1, -1, -1), mu, log_b).sum((1, 2, 3))
        of_text, of_image = log_likelihood(model, model.layout.pack(text.expand(36, -1), tokens))
        exact = float(-(each + of_text + of_image).logsumexp(0)) / math.log(2) / 24
        runs = [likelihood.bits_per_dim(dvae, model, [(image, text)], seed) for seed in range(40)]
        assert runs[0]["argmax"]["bits_per_dim"] >= exact
        assert np.mean([one["sampled"]["bits_per_dim"] for one in runs]) >= exact


RED, GREEN, BLUE = (1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0)


def plain(*colors: Sequence[float], side: int = 32) -> Tensor:
    return torch.tensor(colors)[:, :, None, None].expand(-1, -1, side, side).contiguous()


class Table:
    """An Embedder: an image is its mean color without gray, a caption is looked up by its last word."""

    WORDS: ClassVar = {"red": RED, "green": GREEN, "blue": BLUE, "gray": (3**-0.5,) * 3, "cyan": (-1.0, 0, 0)}

    def embed_images(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize((pixels - pixels.amin(1, keepdim=True)).mean((2, 3)), dim=1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([self.WORDS[one.rstrip(".").split()[-1]] for one in captions])


class Reader(Table):
    """Takes an image with a white label for the next class."""

    def embed_images(self, pixels: Tensor) -> Tensor:
        labeled = (pixels.amin(1) > 0.95).float().mean((1, 2)) > 0.01
        own = super().embed_images(pixels)
        return torch.where(labeled[:, None], own.roll(1, dims=1), own)


class TestCLIP:
    def test_our_scorers_embed(self, dalle, prompt):
        assert isinstance(dalle.scorer, Embedder)
        images = torch.rand(3, 3, 32, 32)
        vectors, captions = dalle.scorer.embed_images(images), dalle.scorer.embed_captions([prompt, prompt])
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
        assert torch.allclose(vectors @ captions[0], dalle.scorer.score(images, prompt))

    def test_clip_score_is_hessels(self):
        scores = clip.clip_scores(Table(), plain(RED, GREEN, BLUE, RED), ["red", "blue", "gray", "cyan"])
        assert scores["cosine"].tolist() == pytest.approx([1, 0, 3**-0.5, -1], abs=1e-6)
        assert scores["clip_score"].tolist() == pytest.approx([2.5, 0, 2.5 * 3**-0.5, 0], abs=1e-6)

    def test_zero_shot(self):
        classes = clip.class_vectors(Table(), ["red", "green", "blue"], ["{}", "a photo of {}."])
        assert torch.allclose(classes, torch.eye(3))
        ranked = clip.zero_shot(Table(), plain(RED, (0.2, 0.9, 0.1), (0.5, 0.6, 0.4)), classes)
        assert ranked.tolist() == [[0, 1, 2], [1, 0, 2], [1, 0, 2]]
        accuracy = clip.accuracy(ranked, torch.tensor([0, 1, 2]))
        assert accuracy == {"acc_top_1": 2 / 3, "acc_chance": 1 / 3}

    def test_a_clip_that_reads_follows_the_written_word(self):
        batches = [(plain(RED, GREEN, side=96), torch.arange(2)), (plain(RED, side=96), torch.arange(1))]
        names, classes = ["red", "green"], torch.eye(3)[:2]
        blind = clip.typographic_attack(Table(), batches, names, classes, 0)
        assert blind == {"acc_clean": 1, "acc_attacked": 1, "attack_success": 0, "attack_success_clean": 0}
        reader = clip.typographic_attack(Reader(), batches[1:], names, classes, 0)
        assert reader == {"acc_clean": 1, "acc_attacked": 0, "attack_success": 1, "attack_success_clean": 0}

    def test_the_word_is_written_within_the_image_by_the_seed(self):
        image, rngs = plain(BLUE, side=64), map(np.random.default_rng, (3, 3, 4))
        one, again, other = (clip.write_words(image, ["iPod"], rng) for rng in rngs)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert 0.005 < (one.amax(1) < 0.2).float().mean().item() < 0.2
        assert (one == image).float().mean() > 0.6


def test_retrieval_of_several_captions_and_of_ties():
    captions = torch.tensor([[0.9, 0.1, 0], [0.1, 0.8, 0], [0.7, 0.2, 0.1], [0.1, 0.1, 0.9]])
    assert retrieval(torch.eye(3), captions, [0, 0, 1, 2], ks=(1, 2)) == {
        "image_to_text_acc": {"R@1": 2 / 3, "R@2": 1.0},  # image 1: 0.8 of a wrong one before 0.2
        "text_to_image_acc": {"R@1": 0.5, "R@2": 1.0},
    }
    same = torch.ones(20, 4)
    assert all(set(shares.values()) == {0} for shares in retrieval(same, same, range(20)).values())


def test_retrieval_is_that_of_sorting():
    rng, own = torch.Generator().manual_seed(0), torch.arange(40)
    images, captions = torch.randn(40, 8, generator=rng), torch.randn(40, 8, generator=rng)
    report, cosines = retrieval(images, captions, range(40)), images @ captions.T
    for k in (1, 5, 10):
        by_image = (cosines.topk(k, dim=1).indices == own[:, None]).any(1).float().mean().item()
        by_caption = (cosines.topk(k, dim=0).indices == own).any(0).float().mean().item()
        assert report["image_to_text_acc"][f"R@{k}"] == pytest.approx(by_image)
        assert report["text_to_image_acc"][f"R@{k}"] == pytest.approx(by_caption)


def test_best_of_n_is_the_mean_over_every_subset():
    rng = np.random.default_rng(0)
    scores, values = rng.random((2, 5)), rng.random((2, 5))
    for n, value in best_of_n(scores, values, (1, 2, 3, 5)).items():
        subsets = itertools.product(range(2), itertools.combinations(range(5), n))
        kept = [values[row, max(subset, key=scores[row].item)] for row, subset in subsets]
        assert value == pytest.approx(np.mean(kept))
    tied = best_of_n(np.zeros((1, 4)), np.array([[1.0, 0, 0, 0]]))
    assert tied == pytest.approx({1: 0.25, 2: 0.25, 4: 0.25})
    curve = best_of_n(np.arange(512.0)[None])
    assert list(curve) == sizes(512) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert (curve[1], curve[512]) == (pytest.approx(511 / 2), pytest.approx(511))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: MeanMetric().values(), "nothing to measure"),
        (lambda: likelihood.nats_per_token(None, []), "no pairs"),
        (lambda: clip.clip_scores(Table(), plain(RED), ["red", "red"]), "1 images with 2 captions"),
        (lambda: clip.class_vectors(Table(), ["red", "blue"], ["a photo"]), "templates must be one or more"),
        (lambda: retrieval(torch.eye(3), torch.eye(3), [0, 1, 1]), "must have a caption"),
        (lambda: best_of_n(np.zeros((2, 3)), np.zeros((2, 4))), "one shape"),
        (lambda: best_of_n(np.zeros((0, 3))), "one shape"),
        (lambda: best_of_n(np.zeros((1, 3)), ns=(4,)), "n must be 1 to 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()


def test_the_accuracy_of_a_pair_is_the_mean_over_its_captions():
    captions = [
        "a red tee above a blue bar on a white background",
        "a small red tee at the top on a black background",
    ]
    samples = ShapesSamples(captions, torch.empty(0), [], np.array([[True, False], [True, True]]))
    assert pair_accuracy([samples]) == {"red": {"tee": 0.75}, "blue": {"bar": 0.5}}
