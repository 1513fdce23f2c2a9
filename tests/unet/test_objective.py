"""The objective of diffusion against sums written out, its division into parts, conditions of training."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dalle.commands.train_diffusion import TrainDiffusionArgs, train_diffusion
from dalle.data.config import DataConfig
from dalle.diffusion import make_schedule, vlb_bits
from dalle.runs.batches import DiffusionBatch
from dalle.schedules import Schedule
from dalle.train.loggers import read_log
from dalle.types import BatchShard, ImageTextBatch
from dalle.unet import DiffusionConfig, UNet, UNetConfig
from dalle.unet.conditions import MASKS, random_mask, smaller
from dalle.unet.objective import DiffusionObjective

T, N = 40, 8
SMALL = UNetConfig(
    image_size=8,
    width=32,
    channel_mult=(1, 2),
    blocks=1,
    attention=(),
    middle_attention=False,
    text="none",
    learned_variance=False,
    diffusion=DiffusionConfig(steps=T),
)


class Recorder:
    """A model whose output is a share of its input; keeps what it was given."""

    def __init__(self, config, share=0.25):
        self.config = SimpleNamespace(downsample_factor=1)
        self.share, self.channels, self.calls = share, config.out_channels // 3, []

    def __call__(self, x, t, **conditions):
        self.calls.append((x, t, conditions))
        return torch.cat([self.share * x] * self.channels, dim=1)


def pixels(count=N, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(config, batch, part=None, seed=3):
    model = Recorder(config)
    torch.manual_seed(seed)
    loss = DiffusionObjective(config)(model, batch, 0, *([part] if part else []))
    return loss, *model.calls[0]


def noise_in(xt, images, t, schedule):
    alpha, sigma = schedule.alpha_sigma(t, xt)
    return (xt - alpha * (2 * images - 1)) / sigma


def cosine_alpha_bar(t):
    """Improved DDPM, Equation 17; the last step alone reaches the limit of beta, 0.999."""
    f = lambda u: math.cos((u / T + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return f(t + 1) / f(0) if t < T - 1 else f(t) / f(0) * 0.001


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_l_simple_is_the_mean_square_of_what_is_predicted(prediction):
    config = replace(SMALL, diffusion=DiffusionConfig(steps=T, prediction=prediction))
    batch = {"pixels": pixels()}
    loss, xt, t, _ = loss_of(config, batch)
    expected = []
    for image, noised, step in zip(batch["pixels"].double(), xt.double(), t.tolist(), strict=True):
        alpha, sigma = math.sqrt(cosine_alpha_bar(step)), math.sqrt(1 - cosine_alpha_bar(step))
        x0 = 2 * image - 1
        noise = (noised - alpha * x0) / sigma
        target = {"noise": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]
        expected.append((0.25 * noised - target).square().mean())
        assert step > 30 or abs(float(noise.std()) - 1) < 0.3
    assert float(loss.total) == pytest.approx(float(sum(expected)) / N, rel=1e-4)
    for quarter in range(4):
        own = [e for e, step in zip(expected, t.tolist(), strict=True) if step * 4 // T == quarter]
        assert len(own) == N / 4
        assert float(loss.metrics[f"mse_q{quarter + 1}"]) == pytest.approx(float(sum(own)) / 2, rel=1e-4)


def test_l_hybrid_adds_the_bound_to_l_simple():
    config = replace(SMALL, learned_variance=True)
    batch, schedule = {"pixels": pixels()}, make_schedule("cosine", T)
    loss, xt, t, _ = loss_of(config, batch)
    found = schedule.denoised(torch.cat([0.25 * xt] * 2, dim=1), xt, t, "noise", "learned")
    bound = T * vlb_bits(schedule, found, 2 * batch["pixels"] - 1, xt, t).mean()
    mse = F.mse_loss(0.25 * xt, noise_in(xt, batch["pixels"], t, schedule))
    assert float(loss.metrics["mse"]) == pytest.approx(float(mse), rel=1e-4)
    assert float(loss.total) == pytest.approx(float(mse) + 0.001 * float(bound), rel=1e-4)
    assert float(loss.metrics["vlb"]) == pytest.approx(float(bound), rel=1e-3)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_see_the_timesteps_and_the_noise_of_the_whole_batch(count):
    """Any division among processes and passes gives the same numbers, also those of the quarters."""
    batch = {"pixels": pixels()}
    whole, xt, t, _ = loss_of(SMALL, batch)
    parts = [
        loss_of(SMALL, {"pixels": chunk}, BatchShard(i, count))
        for i, chunk in enumerate(batch["pixels"].chunk(count))
    ]
    assert torch.equal(torch.cat([part[1] for part in parts]), xt)
    assert torch.equal(torch.cat([part[2] for part in parts]), t)
    assert float(torch.stack([part[0].total for part in parts]).mean()) == pytest.approx(float(whole.total))
    for name, value in whole.metrics.items():
        mean = torch.stack([part[0].metrics[name] for part in parts]).mean()
        assert float(mean) == pytest.approx(float(value), rel=1e-5), name


def test_timesteps_are_spread_over_the_batch_in_random_order():
    orders = set()
    for seed in range(20):
        _, _, t, _ = loss_of(SMALL, {"pixels": pixels()}, seed=seed)
        assert sorted(step * N // T for step in t.tolist()) == list(range(N))
        orders.add(tuple(t.tolist()))
    assert len(orders) == 20
    first = Counter(row[0] * N // T for row in orders)
    assert len(first) > 4


def test_known_pixels_are_those_of_the_image_and_dropout_differs_between_parts():
    config, mask = replace(SMALL, inpainting=True), torch.ones(N, 1, 8, 8)
    batch = {"pixels": pixels(), "mask": mask}
    _, _, _, given = loss_of(config, batch)
    assert given.keys() == {"mask", "known"}
    assert torch.equal(given["known"], 2 * batch["pixels"] - 1)
    seeds = {torch.rand(()).item() for i in range(2) if loss_of(SMALL, batch, BatchShard(i, 2))}
    assert len(seeds) == 2


def test_the_cost_of_a_step_is_thrice_a_forward_pass():
    objective, batch = DiffusionObjective(SMALL), {"pixels": pixels()}
    cost = objective.step_cost(UNet(SMALL), batch)
    assert cost.samples == N
    first = 2 * 27 * 32 * 64  # a 3 x 3 convolution of 3 to 32 channels on 64 pixels
    assert cost.flops > 3 * N * 50 * first
    assert objective.step_cost(UNet(SMALL), {"pixels": pixels(2 * N)}).flops == 2 * cost.flops


# Conditions.


def test_smaller_images_are_means_of_areas_and_some_are_blurred():
    images = pixels(2)
    blurred = smaller(images, 4, torch.tensor([True, True]))
    plain = smaller(images, 4, torch.tensor([False, False]))
    torch.testing.assert_close(plain, F.avg_pool2d(images, 2))
    torch.testing.assert_close(
        smaller(images, 4, torch.tensor([True, False])), torch.stack([blurred[0], plain[1]])
    )
    weights = np.exp(-np.array([1, 0, 1]) / (2 * 0.6**2))
    weights /= weights.sum()
    padded = np.pad(plain.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    expected = sum(
        weights[y] * weights[x] * padded[:, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)
    )
    np.testing.assert_allclose(blurred.numpy(), expected, rtol=1e-5)


def test_random_masks_of_every_kind():
    masks = torch.stack([random_mask(np.random.default_rng(i), 16) for i in range(300)])
    assert masks.shape == (300, 1, 16, 16)
    assert masks.unique().tolist() == [0, 1]
    known = masks.mean(dim=(1, 2, 3))
    assert 300 / len(MASKS) / 2 < (known == 0).sum() < 2 * 300 / len(MASKS)
    assert (known < 1).all()
    sides = [(mask.amin(dim=axis) == mask.amax(dim=axis)).all() for mask in masks[:, 0] for axis in (0, 1)]
    assert 30 < sum(map(bool, sides)) - 2 * int((known == 0).sum()) < 120  # erased from one side
    borders = torch.cat([masks[:, 0, 0], masks[:, 0, -1], masks[:, 0, :, 0], masks[:, 0, :, -1]], dim=1)
    assert ((borders == 0).all(dim=1) & (known > 0)).sum() > 10  # all but a box
    assert ((borders == 1).all(dim=1)).sum() > 10  # a box within


class Letters:
    """A text tokenizer of letters."""

    def encode(self, caption):
        return [ord(letter) - ord("a") for letter in caption]


ARGS = TrainDiffusionArgs(
    data=DataConfig(path="shapes", resolution=8),
    model=replace(SMALL, text="ids", text_len=3, text_vocab=26, text_width=32, text_heads=2, text_layers=1),
    low_resolution=4,
)


def samples(captions):
    images = np.random.default_rng(0).random((len(captions), 3, 8, 8), dtype=np.float32)
    return ImageTextBatch(images, [[caption] for caption in captions], [(0, i) for i in range(len(captions))])


def test_captions_become_ids_and_a_share_of_them_pads():
    made, truncated = DiffusionBatch(ARGS, Letters(), 0.0)(samples(["ab", "abcd", ""]))
    assert made["text"].tolist() == [[0, 1, 26], [0, 1, 2], [26, 26, 26]]
    assert truncated == 1
    dropped = DiffusionBatch(ARGS, Letters(), 0.2)
    texts = dropped(samples(["ab"] * 500), 3)[0]["text"]
    assert 0.15 < float((texts == 26).all(dim=1).float().mean()) < 0.25
    assert torch.equal(dropped(samples(["ab"] * 500), 9)[0]["text"], texts)


def test_conditions_are_those_that_the_model_takes():
    model = replace(ARGS.model, text="none", low_resolution=True, inpainting=True, classes=2)
    args = replace(ARGS, model=model, class_names=("cat", "dog"), blurred=1.0)
    batch = samples(["dog", "cat", "dog"])
    made, _ = DiffusionBatch(args, None, 0.0)(batch)
    assert made.keys() == {"pixels", "labels", "low_resolution", "mask"}
    assert made["labels"].tolist() == [1, 0, 1]
    x0 = 2 * torch.from_numpy(batch.pixels) - 1
    torch.testing.assert_close(made["low_resolution"], smaller(x0, 4, torch.ones(3, dtype=torch.bool)))
    DiffusionObjective(model)(UNet(model), made, 0).total.backward()
    with pytest.raises(ValueError, match="caption 'cow' is none of class_names"):
        DiffusionBatch(args, None, 0.0)(samples(["cow"]))


@pytest.mark.slow
def test_a_model_of_shapes_learns_to_remove_noise(tmp_path, tiny_runs, chain, with_inputs):
    """200 steps: the error falls below a third of that of one who sees no noise, in every quarter."""
    run = tiny_runs.diffusion
    optimizer = replace(run.train.optimizer, lr=Schedule(2e-3, 1e-4, 200), max_grad_norm=1.0)
    train = replace(run.train, batch_size=16, optimizer=optimizer, eval_every=200, save_every=200)
    train_diffusion(with_inputs(run, chain, out=tmp_path, steps=200, train=train))
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "mse" in line]
    assert lines[0]["mse"] == pytest.approx(1, abs=0.1)
    last = {name: np.mean([line[name] for line in lines[-40:]]) for name in lines[0] if "mse" in name}
    assert last["mse"] < 0.33
    assert last["mse_q4"] < last["mse_q3"] < last["mse_q2"] < last["mse_q1"] < 0.8
