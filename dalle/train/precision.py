"""Device and precision (fp32, or bf16 or fp16 under autocast)."""

import copy
import os

import torch
from torch import nn

from dalle.train.config import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def local_device(name: str) -> torch.device:
    """This process's device under torchrun: the GPU of its LOCAL_RANK."""
    device, number = resolve_device(name), os.environ.get("LOCAL_RANK")
    if device.type == "cpu" or number is None:
        return device
    if device.type != "cuda" or device.index is not None:
        raise ValueError(f"--device {name} cannot be shared among processes; use cuda, cpu or auto")
    if int(number) >= torch.cuda.device_count():
        raise ValueError(
            f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", int(number))


def resolve_precision(precision: Precision, device: torch.device, inference: bool = False) -> str:
    """ "auto" becomes bf16 where the device multiplies it in hardware, else fp32.

    For inference, which needs no loss scale, it is fp16 on CUDA cards whose tensor cores know only that.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip or capability >= (8, 0):
            return "bf16"
        return "fp16" if inference and capability >= (7, 0) else "fp32"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512" and has_bf16:
        return "bf16" if has_bf16() else "fp32"
    return "fp32"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for a forward pass."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def resolve_device(name: str) -> torch.device:
    """A device that is there; "auto" becomes cuda, mps or cpu, the first there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in available.items() if found))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in available:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, cuda, cuda:1 or mps")
    if not available[device.type]:
        raise ValueError(f"this computer has no {device.type} that torch can use; give --device auto")
    return device


def copy_to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a model on a device, which shares the tensors that are there already; itself if all are."""
    if all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())):
        return model
    moved = {id(p): nn.Parameter(p.detach().to(device), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, moved | {id(buffer): buffer.to(device) for buffer in model.buffers()})
