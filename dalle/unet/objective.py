"""Training objective of diffusion: L_simple, or L_hybrid where the variance is learned (Improved DDPM).

B batch, N samples of a step over all processes and passes, T timesteps
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dalle.diffusion.losses import VLB_WEIGHT, hybrid, simple, stratified_steps
from dalle.diffusion.schedule import make_schedule
from dalle.io.images import check_image_shape
from dalle.sampling import numbers_by_place
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost
from dalle.unet.config import UNetConfig
from dalle.unet.model import UNet

QUARTERS = 4


class DiffusionObjective:
    """Mean squared error of the prediction at random timesteps, plus the variance's part of L_vlb."""

    def __init__(self, config: UNetConfig):
        self.config, diffusion = config, config.diffusion
        self.schedule = make_schedule(diffusion.schedule, diffusion.steps)

    def __call__(
        self, model: UNet, batch: dict[str, Tensor], step: int, part: BatchShard = FULL_BATCH
    ) -> Loss:
        """batch: "pixels" (B, 3, H, W) in [0, 1], checked where batches are made, and conditions by the names
        of `UNet.forward`; the known pixels of a "mask" are those of the image.

        Timesteps are spread evenly over the N samples, in random order. They and the noise of a sample follow
        from torch's seed and its place among the N, however these are divided.
        """
        check_image_shape(batch["pixels"], model.config.downsample_factor)
        x0, conditions = 2 * batch["pixels"] - 1, {n: c for n, c in batch.items() if n != "pixels"}
        first, total = part.index * len(x0), part.count * len(x0)
        uniform, order = numbers_by_place(x0.new_empty(1, 2, total), 0)[0]
        steps = stratified_steps(uniform, len(self.schedule))[order.argsort()]  # (N,)
        noise, t = numbers_by_place(x0, first, normal=True), steps[first : first + len(x0)]
        if part.count > 1:  # dropout of its own for each part
            torch.manual_seed(torch.initial_seed() + part.index)
        if "mask" in conditions:
            conditions["known"] = x0
        output = predict(model, self.schedule.add_noise(x0, noise, t), t, conditions)
        prediction = self.config.diffusion.prediction
        losses = mse = simple(output[:, :3], self.schedule.target(x0, noise, t, prediction))
        if self.config.learned_variance:
            losses = hybrid(self.schedule, output, x0, noise, t, prediction)
        metrics = {"mse": mse.detach().mean()} | self._by_quarter(mse.detach(), t, steps)
        if self.config.learned_variance:  # of L_vlb without L_T, in bits per dimension
            metrics["vlb"] = (losses - mse).detach().mean() / VLB_WEIGHT
        return Loss(losses.mean(), metrics)

    def _by_quarter(self, mse: Tensor, t: Tensor, steps: Tensor) -> dict[str, Tensor]:
        """Mean error of the N samples in each quarter of the timesteps, least noise first; 0 for none."""
        own, of_all = (QUARTERS * each // len(self.schedule) for each in (t, steps))
        found = {}
        for quarter in range(QUARTERS):
            weight = len(steps) / (of_all == quarter).sum().clamp(min=1)
            found[f"mse_q{quarter + 1}"] = weight * (mse * (own == quarter)).mean()
        return found

    def step_cost(self, model: UNet, batch: dict[str, Tensor]) -> StepCost:
        """Counted on a twin without memory; backward takes twice the forward pass."""
        count = len(batch["pixels"])
        with FakeTensorMode(), torch.device("cpu"), FlopCounterMode(display=False) as counter:
            one = {name: torch.empty(1, *c.shape[1:], dtype=c.dtype) for name, c in batch.items()}
            x = one.pop("pixels")
            predict(UNet(model.config), x, torch.zeros(1), one | ({"known": x} if "mask" in one else {}))
        return StepCost(count, flops=3 * count * counter.get_total_flops())


def predict(model: UNet, x: Tensor, t: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The model's output for a batch of training, whose text ids were checked when they were packed."""
    if (ids := conditions.get("text")) is not None:
        conditions = conditions | {"text": model.encode_text(ids, check=False)}
    return model(x, t, **conditions)
