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
    """Whether fp32 matrix products inside the block may be TF32; convolutions are not. CUDA only.

    The switches are torch's and belong to the process; a backward pass follows those of its own time.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = products, False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 operands are multiplied in fp32 inside the block: no autocast and no TF32."""
    with tf32(False), torch.autocast(device.type, enabled=False):
        yield


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Products of unit vectors (N, E) and (C, E) -> fp32 (N, C), exact under any autocast."""
    with full_precision(images.device):
        return images.float() @ texts.float().T
