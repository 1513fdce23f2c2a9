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

    The switches are torch's and belong to the process; a backward pass follows those of its own time. torch
    has them under two names, and the older cannot be read where a program has set the newer.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    switches = [(matmul, "allow_tf32", products), (cudnn, "allow_tf32", False)]
    try:
        before = [getattr(owner, name) for owner, name, _ in switches]
    except RuntimeError:
        format = "tf32" if products else "ieee"
        switches = [(matmul, "fp32_precision", format), (cudnn.conv, "fp32_precision", "ieee")]
        before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, value in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """fp32 operands are multiplied in fp32 inside the block: no autocast and no TF32."""
    with tf32(False), torch.autocast(device.type, enabled=False):
        yield


def cosines(images: Tensor, texts: Tensor) -> Tensor:
    """Products of unit vectors (N, E) and (C, E) -> fp32 (N, C), exact under any autocast."""
    with full_precision(images.device):
        return images.float() @ texts.float().T
