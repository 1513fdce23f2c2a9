"""Training objective of the dVAE: the relaxed evidence lower bound (Section 2.1, A.2)."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dalle.dvae.config import DVAELossConfig
from dalle.dvae.losses import gumbel_softmax, kl_loss, reconstruction_loss
from dalle.dvae.metrics import code_usage
from dalle.dvae.model import DVAE
from dalle.io.images import check_image_shape
from dalle.types import FULL_BATCH, BatchShard, Loss, StepCost


class DVAEObjective:
    """The relaxed evidence lower bound: reconstruction + beta KL (Section 2.1, A.2)."""

    def __init__(self, config: DVAELossConfig = DVAELossConfig()):
        self.config = config

    def __call__(self, model: DVAE, batch: Tensor, step: int, part: BatchShard = FULL_BATCH) -> Loss:
        """batch: pixels (B, 3, H, W) in [0, 1], checked where batches are made (dalle/runs/batches.py).

        The use of the codes is that of all processes together.
        """
        check_image_shape(batch, model.downsample_factor)
        tau, beta = self.config.tau(step), self.config.beta(step)
        logits = model.codebook_logits(batch)
        mu, log_b = model.reconstruct(gumbel_softmax(logits, tau, part.index * len(batch)))
        soft = reconstruction_loss(batch, mu, log_b)
        kl = kl_loss(logits, batch[0].numel())
        usage = code_usage(logits.detach().argmax(dim=1).flatten(), model.vocab_size, part)
        positions = logits[0, 0].numel()
        metrics = {
            "recon_loss": soft.detach(),
            "kl": kl.detach() * batch[0].numel() / positions,  # nats a position
            "tau": tau,
            "beta": beta,
            **usage,
        }
        return Loss(soft + beta * kl, metrics)

    def step_cost(self, model: DVAE, batch: Tensor) -> StepCost:
        """Of the convolutions, counted on a twin without memory; backward takes twice the forward pass."""
        with FakeTensorMode(), torch.device("cpu"), FlopCounterMode(display=False) as counter:
            twin = DVAE(model.config)
            twin.reconstruct(twin.codebook_logits(torch.empty(1, *batch.shape[1:])))
        return StepCost(len(batch), flops=3 * len(batch) * counter.get_total_flops())
