"""Gradient scales for fp16: one per resblock of the transformer (section 2.4, appendix D, guideline 1).

Beyond a billion parameters no single loss scale keeps the gradients of early and late resblocks inside fp16.
So each resblock multiplies its gradient before the cast to fp16 and divides it after (dalle/nn/blocks.py).
Its scale

    starts at 2^13;
    is multiplied by 2^(1/1000) after a step with finite gradients in that resblock;
    is divided by sqrt(2) otherwise, at most once in 125 steps;
    stays within [2^7, 2^24].

The paper divides the loss by the images of all M replicas and multiplies these scales by M. Here each process
takes the mean over its shard, M times as large, and gradients are averaged in fp32: the same numbers in fp16.
A step with any gradient that is not finite is skipped.

The dVAE and CLIP have one scale on the loss: stage one was trained so (A.2).
"""

import torch
from torch import Tensor, nn

from dalle.train.distributed import local

START = 2.0**13
GROWTH = 2.0 ** (1 / 1000)
BACKOFF = 2.0**-0.5
BACKOFF_INTERVAL = 125
LOWEST, HIGHEST = 2.0**7, 2.0**24


class PerBlockGradScaler:
    """The scales of a model's resblocks in order; sets their attribute `gradient_scale`."""

    patience = BACKOFF_INTERVAL
    """How many times as many steps in a row may be skipped, since a scale comes down so slowly."""

    def __init__(self, resblocks: list[nn.Module]):
        self.resblocks, device = resblocks, next(resblocks[0].parameters()).device
        self.values = torch.full((len(resblocks),), START, device=device)
        self.since_backoff = torch.full((len(resblocks),), BACKOFF_INTERVAL, dtype=torch.int64, device=device)
        for block, value in zip(resblocks, self.values.unbind(), strict=True):
            block.gradient_scale = value  # a view: it follows `values`

    def scale(self, loss: Tensor) -> Tensor:
        """The loss as it is: resblocks scale their own gradients."""
        return loss

    @torch.no_grad()
    def unscale(self) -> Tensor:
        """Divides gradients by their resblock's scale; bool (blocks,): whether they are finite here."""
        finite = []
        for block, value in zip(self.resblocks, self.values, strict=True):
            gradients = [local(p.grad) for p in block.parameters() if p.grad is not None]
            if gradients:
                torch._foreach_div_(gradients, value)
            finite.append(torch.stack([value.isfinite(), *(g.isfinite().all() for g in gradients)]).all())
        return torch.stack(finite)

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Moves each scale by the rules above; `finite`: bool (blocks,)."""
        back = ~finite & (self.since_backoff >= BACKOFF_INTERVAL)
        factor = torch.ones_like(self.values).masked_fill_(finite, GROWTH).masked_fill_(back, BACKOFF)
        self.since_backoff.add_(1).masked_fill_(back, 1)
        self.values.mul_(factor).clamp_(LOWEST, HIGHEST)

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes."""
        return {"values": self.values, "since_backoff": self.since_backoff}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """In place, so that the resblocks see it; ValueError for another number of resblocks."""
        if tensors["values"].shape != self.values.shape:
            raise ValueError(f"{len(tensors['values'])} gradient scales for {len(self.values)} resblocks")
        self.values.copy_(tensors["values"])
        self.since_backoff.copy_(tensors["since_backoff"])


class GlobalGradScaler:
    """One scale on the loss, by the rule and the defaults of torch.amp.GradScaler, within [1, 2^24].

    It starts at 2^16, is doubled after 2000 finite steps in a row and halved after each step that is not. It
    stays on the device, where GradScaler asks in each step whether gradients are finite.
    """

    start, interval = 2.0**16, 2000
    patience = 4

    def __init__(self, model: nn.Module):
        self.parameters, device = list(model.parameters()), next(model.parameters()).device
        self.values = torch.full((1,), self.start, device=device)
        self.finite_in_a_row = torch.zeros(1, dtype=torch.int64, device=device)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to start the backward pass from."""
        return loss * self.values[0]

    @torch.no_grad()
    def unscale(self) -> Tensor:
        """Divides gradients by the scale; bool (1,): whether they are finite here."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        torch._foreach_div_(gradients, self.values[0])
        return torch.stack([gradient.isfinite().all() for gradient in gradients]).all()[None]

    @torch.no_grad()
    def update(self, finite: Tensor) -> None:
        """Moves the scale by the rule above; `finite`: bool (1,)."""
        self.finite_in_a_row.add_(1).mul_(finite)
        grows = self.finite_in_a_row == self.interval
        factor = torch.ones_like(self.values).masked_fill_(~finite, 0.5).masked_fill_(grows, 2.0)
        self.values.mul_(factor).clamp_(1.0, HIGHEST)
        self.finite_in_a_row.masked_fill_(grows, 0)

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes."""
        return {"values": self.values, "finite_in_a_row": self.finite_in_a_row}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        self.values.copy_(tensors["values"])
        self.finite_in_a_row.copy_(tensors["finite_in_a_row"])


GradScaler = PerBlockGradScaler | GlobalGradScaler


def build_grad_scaler(model: nn.Module) -> GradScaler:
    """A scale for each of the model's resblocks, or one for a model that names other parts in 16 bit.

    ValueError for a model that names none.
    """
    if hasattr(model, "resblocks"):
        return PerBlockGradScaler(model.resblocks())
    if hasattr(model, "fsdp_groups"):
        return GlobalGradScaler(model)
    raise ValueError(f"{type(model).__name__} has no gradient scales for fp16; set precision to bf16 or fp32")
