"""Weight-only int8 quantization for sampling: a step reads a quarter of the bytes of fp32.

Row o of a matrix is scale[o] * codes[o], its largest magnitude being 127 scales. Only weights are rounded; on
a CPU their inputs are also cast to bf16, which its kernel needs. Elsewhere a product converts the codes to 16
bits and scales its output: less memory than bf16, not less time. Not in the paper, which samples in 16 bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127
MAX_GEMV_ROWS = 256
"""Up to this many rows a CPU multiplies the codes directly; beyond, it dequantizes the matrix first."""
ALIGNMENT = 64
"""torch's kernel reads whole vectors, past the end of a row whose length is not a multiple of theirs."""


class Int8Linear(nn.Module):
    """A linear layer with its matrix in 8 bits; for inference.

    Args:
        linear: the layer it stands for, of any number format, which stays that of results. Its bias is
            shared.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LARGEST).bfloat16()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("weight", linear.weight.new_empty(0))  # device and dtype, as of nn.Linear
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), in the layer's number format."""
        product = int8_linear(x.to(self.weight.dtype), self)
        return product if self.bias is None else product + self.bias


def int8_linear(x: Tensor, linear: Int8Linear, rows: slice = slice(None)) -> Tensor:
    """x (..., inputs) by some rows of a layer's matrix, without its bias, in the number format of x."""
    codes, scale = linear.codes[rows], linear.scale[rows]
    if x.device.type == "cpu" and x.shape[:-1].numel() <= MAX_GEMV_ROWS and x.shape[-1] % ALIGNMENT == 0:
        product = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16().contiguous(), codes, scale)
        return product.to(x.dtype).unflatten(0, x.shape[:-1])
    if x.device.type == "cpu":
        return F.linear(x, codes.to(x.dtype) * scale.to(x.dtype)[:, None])
    return scaled_product(x, codes, scale)


def scaled_product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., inputs) by the matrix scale * codes, with at most two bytes a weight of memory besides.

    The sums of codes, which may exceed the largest number of fp16, are divided before they are rounded to it.
    """
    flat, none, limit = x.flatten(0, -2), x.new_zeros(()), LARGEST + 1
    parts = codes.chunk(max(1, x.dtype.itemsize // 2))  # fp32: half the matrix at a time
    products = [torch.addmm(none, flat, part.to(x.dtype).T, beta=0, alpha=1 / limit) for part in parts]
    product = torch.cat(products, dim=1) * (scale * limit).to(x.dtype)
    return product.unflatten(0, x.shape[:-1])
