"""Tensors of a CPU that pass for those of an accelerator without float64, as Apple's MPS."""

import weakref
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter


class NoFloat64(TorchDispatchMode):
    """Refuses float64 in what is computed from tensors of the device, until `.cpu()` copies them."""

    def __init__(self, *on_device: Tensor | nn.Module):
        super().__init__()
        self._storages: weakref.WeakSet = weakref.WeakSet()
        for item in on_device:
            tensors = [item] if isinstance(item, Tensor) else [*item.parameters(), *item.buffers()]
            self._storages.update(tensor.untyped_storage() for tensor in tensors)

    def __enter__(self) -> "NoFloat64":
        self._patch = patch.object(Tensor, "cpu", _copy_to_host)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        if any(tensor.untyped_storage() in self._storages for tensor in inputs):
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor):
                    self._storages.add(tensor.untyped_storage())
                    if tensor.dtype == torch.float64:
                        raise TypeError(f"{func} makes float64 on a device without it")
        return result


def _copy_to_host(tensor: Tensor) -> Tensor:
    with _disable_current_modes():
        return tensor.detach().clone()
