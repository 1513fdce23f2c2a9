"""Matrices kept as whole numbers of 8 bits, for drawing: a step reads a quarter of the bytes of fp32.

Row o of a matrix is scale[o] * codes[o], its largest magnitude being 127 scales. Only weights are rounded; a CPU also
takes what they are multiplied by in bf16, for its routine is fast with nothing else. Not in the paper, which draws in
16 bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
FEW_ROWS = 256
"""Up to so many, a CPU multiplies the codes as they are; beyond, it pays to make a matrix of them first."""
STRIDE = 64
"""torch's routine reads whole vectors, past the end of a row whose length is no multiple of theirs."""


class Int8Linear(nn.Module):
    """A linear layer with its matrix in 8 bits; for inference.

    Args:
        linear: the layer it stands for, of any number format, which stays that of results. Its bias is shared.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LARGEST).bfloat16()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("like", linear.weight.new_empty(0))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), in the layer's number format."""
        product = int8_linear(x.to(self.like.dtype), self)
        return product if self.bias is None else product + self.bias


def weight_like(linear: nn.Linear | Int8Linear) -> Tensor:
    """A tensor of the device and the number format that a linear layer computes on and in."""
    return linear.like if isinstance(linear, Int8Linear) else linear.weight


def int8_linear(x: Tensor, linear: nn.Linear | Int8Linear, rows: slice = slice(None)) -> Tensor:
    """x (..., inputs) by some rows of a layer's matrix, without its bias, in the number format of x."""
    if isinstance(linear, nn.Linear):
        return F.linear(x, linear.weight[rows].to(x.dtype))
    codes, scale = linear.codes[rows], linear.scale[rows]
    if x.device.type == "cpu" and x.shape[:-1].numel() <= FEW_ROWS and x.shape[-1] % STRIDE == 0:
        product = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16().contiguous(), codes, scale)
        return product.to(x.dtype).unflatten(0, x.shape[:-1])
    return F.linear(x, codes.to(x.dtype) * scale.to(x.dtype)[:, None])
