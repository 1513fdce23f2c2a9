"""Metrics of images against independent formulas: PSNR, SSIM, blur, FID, inception score, statistics."""

import math

import numpy as np
import pytest
import torch

from dalle.evals import fid
from dalle.evals.config import RADII
from dalle.evals.psnr_ssim import blur, psnr, ssim


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class TestPSNRAndSSIM:
    def test_known_values(self):
        image, gray = noise(1, 3, 32, 32), torch.full((1, 3, 12, 12), 0.5)
        assert ssim(image, image).item() == pytest.approx(1)
        assert ssim(image, 1 - image).item() < 0
        assert psnr(gray, gray + 0.1).item() == pytest.approx(20, abs=1e-5)
        assert psnr(gray, gray).item() == math.inf

    @pytest.mark.parametrize("metric", [psnr, ssim])
    def test_each_pair_has_its_own_value(self, metric):
        a, b = noise(3, 3, 12, 12), noise(3, 3, 12, 12, seed=1)
        assert torch.allclose(metric(a, b), torch.cat([metric(a[[i]], b[[i]]) for i in range(3)]))

    def test_ssim_is_wangs_formula_in_every_window(self):
        a, b = noise(1, 2, 13, 14).double(), noise(1, 2, 13, 14, seed=1).double()
        offsets = torch.arange(11).double() - 5
        weights = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
        weights /= weights.sum()
        x, y = (z.unfold(2, 11, 1).unfold(3, 11, 1) for z in (a, b))  # windows 11 x 11

        def mean(z):
            return (z * weights).sum((-1, -2), keepdim=True)

        mx, my = mean(x), mean(y)
        vx, vy, cov = mean((x - mx) ** 2), mean((y - my) ** 2), mean((x - mx) * (y - my))
        c1, c2 = 0.01**2, 0.03**2
        expected = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        assert ssim(a, b).item() == pytest.approx(expected.mean().item(), abs=1e-10)


class TestBlur:
    @pytest.mark.parametrize("radius", RADII[1:])
    def test_a_point_becomes_the_gaussian(self, radius):
        side = 8 * radius + 3 + 2 * (8 * radius)
        image = torch.zeros(1, 1, side, side, dtype=torch.float64)
        image[0, 0, side // 2, side // 2] = 1
        y, x = np.mgrid[:side, :side] - side // 2
        wanted = np.exp(-(x**2 + y**2) / (2 * radius**2)) / (2 * math.pi * radius**2)
        assert np.abs(blur(image, radius)[0, 0].numpy() - wanted).max() < 1e-3 * wanted.max()

    def test_an_even_image_and_radius_0(self):
        assert torch.allclose(blur(torch.full((2, 3, 9, 9), 0.3), 8), torch.full((2, 3, 9, 9), 0.3))
        image = noise(1, 3, 8, 8)
        assert torch.equal(blur(image, 0), image)


def test_frechet_distance_agrees_with_the_eigenvalues_of_the_product():
    x, y = noise(9, 5).double(), noise(9, 5, seed=1).double() * 3
    a, b = (fid.FeatureGaussian(z.mean(0), torch.from_numpy(np.cov(z.numpy().T)), 9) for z in (x, y))
    roots = np.linalg.eigvals(a.covariance.numpy() @ b.covariance.numpy()).real.clip(0) ** 0.5
    traces = a.covariance.trace() + b.covariance.trace()
    expected = float((a.mean - b.mean).square().sum() + traces) - 2 * roots.sum()
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_moments_in_uneven_batches_are_numpys_even_far_from_zero():
    features, stats = noise(57, 6) + 3000, fid.FeatureStats()
    for part in features.split([1, 30, 20, 6]):
        stats.add(part)
    found = stats.gaussian()
    assert found.count == 57
    assert np.allclose(found.mean, features.double().numpy().mean(0), rtol=1e-14)
    assert np.allclose(found.covariance, np.cov(features.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_inception_score_is_the_formula_over_shuffled_parts():
    logits = noise(12, 4) * 5
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    parts = np.array_split(logits.double().softmax(1)[order].numpy(), 3)
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    mean, deviation = fid.inception_score(logits, splits=3, seed=3)
    assert (mean, deviation) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
    assert fid.inception_score(torch.eye(8).repeat(10, 1) * 100, splits=1)[0] == pytest.approx(8)


class Corner:
    """Features that a hand can compute: means of colors; counts its calls."""

    hash, resize, metric = "corner", "none", "fid"
    calls = 0

    def __call__(self, pixels):
        self.calls += 1
        means = pixels.mean((2, 3))
        return means, means * 10


def batches() -> tuple[torch.Tensor, ...]:
    return noise(12, 3, 16, 16).split(5)


def test_each_radius_is_measured_on_filtered_images():
    found = {radius: one.gaussian() for radius, one in fid.extract_stats(Corner(), batches(), (0, 2)).items()}
    wanted = blur(noise(12, 3, 16, 16), 2).mean((2, 3)).double()
    assert torch.allclose(found[2].mean, wanted.mean(0))
    assert not torch.allclose(found[0].covariance, found[2].covariance)


def test_the_same_images_have_distance_0_behind_every_blur(tmp_path):
    real, _ = fid.cached_reference_stats(Corner(), batches, {"data": 1}, tmp_path)
    report = fid.compare(fid.extract_stats(Corner(), batches()), real)
    assert list(report) == ["0", "1", "2", "4", "8"]
    for scores in report.values():
        assert scores["fid"] == pytest.approx(0, abs=1e-6)
        assert scores["inception_score"] >= 1


def test_statistics_are_cached_by_all_that_they_depend_on(tmp_path):
    def cached(data):
        extractor = Corner()
        stats, name = fid.cached_reference_stats(extractor, batches, {"data": data}, tmp_path, (0,))
        return stats[0], name, extractor.calls

    (kept, name, calls), (found, same, none) = cached(1), cached(1)
    assert (calls, none, found.count, same) == (3, 0, 12, name)
    assert torch.equal(kept.covariance, found.covariance)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert cached(1)[2] == 3  # a damaged file is computed again
    assert file.read_bytes() == whole
    assert cached(2)[1] != name


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: psnr(noise(2, 3, 12, 12), noise(1, 3, 12, 12)), "two equal shapes"),
        (lambda: ssim(noise(1, 3, 8, 8), noise(1, 3, 8, 8)), "11 x 11 pixels or more"),
        (lambda: blur(noise(1, 3, 8, 8), -1), "cannot be negative"),
        (lambda: fid.FeatureStats().gaussian(), "two features or more, got 0"),
        (lambda: fid.FeatureStats().add(torch.full((1, 4), torch.nan)), "not finite"),
        (lambda: fid.inception_score(noise(4, 5)), "10 parts"),
    ],
)
def test_what_cannot_be_measured_is_refused(refused, message):
    with pytest.raises(ValueError, match=message):
        refused()
