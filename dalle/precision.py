"""fp32 that is fp32: autocast and TF32 switched off around what must be exact (A.2, B.2).

On CUDA cards from Ampere on, fp32 products may be computed in TF32, with 10 of 23 bits after the point; torch
allows it for convolutions by default, and then a dVAE gives other tokens than on other machines.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def tf32(products: bool) -> Iterator[None]:
    """Whether fp32 matrix products inside the block may be TF32, on CUDA; others, and convolutions, are fp32.

    The switches are torch's and belong to the process; a backward pass follows those of its own time. torch
    has them under older names, which cannot be read where a program has set others than they know, and under
    newer ones. Both are set, and restored, so that torch finds them in agreement. Compiled code, whose graph
    a switch would break, follows the settings around it, in a training the `Trainer`'s.
    """
    if torch.compiler.is_compiling():
        yield
        return
    matmul, cudnn, mkldnn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn
    newer = [(owner, owner.fp32_precision) for owner in (matmul, mkldnn.matmul, cudnn.conv)]
    mkldnn.matmul.fp32_precision = "ieee"
    try:
        older = torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older:
            torch.set_float32_matmul_precision("highest")
            matmul.allow_tf32, cudnn.allow_tf32 = products, False
        else:
            matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32" if products else "ieee", "ieee"
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[2]
        for owner, value in newer:
            owner.fp32_precision = value


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 operands are multiplied in fp32 inside the block: no autocast and no TF32."""
    with tf32(False), torch.autocast(device.type, enabled=False):
        yield


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Products of unit vectors (N, E) and (C, E) -> fp32 (N, C), exact under any autocast."""
    with full_precision(images.device):
        return images.float() @ texts.float().T
