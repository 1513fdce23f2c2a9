"""CPU tensors that pass for those of a CUDA device, on a computer without one: values, and errors as there.

What a storage belongs to decides on which device its tensors are: `x.device` says so, moves and factories
follow their arguments, and an operation on tensors of both devices fails as it does on CUDA.
"""

import inspect
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REAL = pytest.param("real", marks=pytest.mark.cuda)
SLOW = pytest.param("pretended", marks=pytest.mark.slow)
only_real = pytest.mark.parametrize("cuda", [REAL], indirect=True)
"""A test on a GPU alone."""
pretended_slowly = pytest.mark.parametrize("cuda", [SLOW, REAL], indirect=True)
"""A test whose pretended device is marked slow."""
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = {"copy_", "_foreach_copy_"}
INDEXED = {"index", "index_put", "index_put_"}
"""Their indices may be on the CPU."""
ANSWERS = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (9, 0),
    "is_current_stream_capturing": False,
    "get_device_name": "pretended",
    "get_device_properties": SimpleNamespace(total_memory=2**34),
    "mem_get_info": (2**33, 2**34),
    "memory_reserved": 0,
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "synchronize": None,
    "get_rng_state": None,
    "set_rng_state": None,
    "reset_peak_memory_stats": None,
}
"""What functions of torch.cuda return."""


def is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, int) and torch.device(device).type == "cuda"


class PretendedCUDA(TorchFunctionMode):
    """Inside the block torch.device("cuda") exists. It refuses float64, as Apple's MPS does."""

    def __init__(self):
        super().__init__()
        self.storages: weakref.WeakSet = weakref.WeakSet()
        self.makes_there = False

    def on_device(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage() in self.storages

    def put(self, tensor: Tensor) -> Tensor:
        self.storages.add(tensor.untyped_storage())
        return tensor

    def __enter__(self) -> "PretendedCUDA":
        autocast, generator = torch.amp.autocast_mode.autocast, torch.Generator
        start, is_enabled, dtype_of = autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
        self.stack, self.run_backward = ExitStack(), torch.autograd._engine_run_backward
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # devices, in and outside of modes
        self.stack.enter_context(patch.dict(checks, {"default": lambda _: None}))
        for name, answer in ANSWERS.items():
            self.stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))

        def start_on_cpu(context: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            start(context, "cpu", *args, **kwargs)

        for target, name, substitute in (
            (autocast, "__init__", start_on_cpu),
            (torch, "is_autocast_enabled", lambda kind="cpu": is_enabled("cpu")),
            (torch, "get_autocast_dtype", lambda kind: dtype_of("cpu")),
            (torch, "Generator", lambda device="cpu": generator("cpu")),
            (torch.autograd, "_engine_run_backward", self._run_backward),
            (torch.accelerator, "current_accelerator", lambda *_, **__: None),
        ):
            self.stack.enter_context(patch.object(target, name, substitute))
        self.stack.enter_context(_Dispatch(self))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        first = args[0] if args else None
        if name == "__get__" and isinstance(first, Tensor):
            return self._attribute(function, first)
        if name in ("to", "cpu", "cuda") and isinstance(first, Tensor):
            return self._move(name, first, list(args[1:]), kwargs)
        if name == "numpy" and self.on_device(first):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu()")
        if name == "get_device" and self.on_device(first):
            return CUDA.index
        if kwargs.get("device") is None or name == "_parse_to":
            made = self._call(function, args, kwargs)
            return self.put(made) if name == "new_tensor" and self.on_device(first) else made
        to_cuda = is_cuda(kwargs["device"])
        if to_cuda:
            kwargs["device"] = CPU
        made = function(*args, **kwargs)
        if to_cuda:
            return self.put(made)
        self.storages.discard(made.untyped_storage())
        return made

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """Checkpointing computes again inside of it."""
        super().__enter__()
        try:
            return self.run_backward(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    def _call(self, function: Callable, args: Any, kwargs: Any) -> Any:
        """A function of C++ makes new tensors where its operands are."""
        self.makes_there = inspect.isbuiltin(function) or inspect.ismethoddescriptor(function)
        self.makes_there &= any(map(self.on_device, tree_leaves((args, kwargs))))
        try:
            return function(*args, **kwargs)
        finally:
            self.makes_there = False

    def _attribute(self, function: Callable, tensor: Tensor) -> Any:
        found = self.on_device(tensor)
        of = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
        answer = next((value for one, value in of.items() if function == one.__get__), None)
        return answer if found and answer is not None else function(tensor)

    def _move(self, name: str, tensor: Tensor, args: list, kwargs: dict) -> Tensor:
        """Tensor.to, .cpu and .cuda."""
        there = self.on_device(tensor)
        target = kwargs.get("device", args[0] if args else None) if name == "to" else torch.device(name)
        if isinstance(target, Tensor):
            goes = self.on_device(target)
        elif target is None or isinstance(target, torch.dtype):
            goes = there
        else:
            goes = is_cuda(target)
            if name != "to" or "device" in kwargs:
                kwargs["device"] = CPU if goes or name != "to" else target
            else:
                args[0] = CPU if goes else target
        moved = tensor.to(*args, **kwargs)
        if goes != there and moved.untyped_storage() is tensor.untyped_storage():
            moved = tensor.clone()
        if goes:
            return self.put(moved)
        self.storages.discard(moved.untyped_storage())
        return moved


class _Dispatch(TorchDispatchMode):
    """Results are where their operands are, and operands are in one place."""

    def __init__(self, pretended: PretendedCUDA):
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            name = op.overloadpacket.__name__
            found, kwargs = self._check(name, args, kwargs), dict(kwargs or {})
            kwargs.pop("pin_memory", None)
            if op == torch.ops.aten.mm.dtype:  # which CUDA alone has
                result = torch.mm(args[0].float(), args[1].float()).to(args[2])
            else:
                result = op(*args, **kwargs)
            if found and name not in COPIES:
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor):
                        self.pretended.put(tensor)
                        if tensor.dtype == torch.float64:
                            raise TypeError(f"{name} makes float64 on a device without it")
            return result

    def _check(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether an operand is on the device; RuntimeError for operands of both devices."""
        if name in INDEXED and self.pretended.on_device(args[0]):
            args = (args[0], *args[2:])
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [self.pretended.on_device(tensor) for tensor in operands]
        shaped = {t for x, t in zip(operands, there, strict=True) if t or x.ndim}
        if len(shaped) > 1 and name not in COPIES:
            raise RuntimeError(f"{name}: expected all tensors on the same device, found cpu and cuda:0")
        return any(there) or (self.pretended.makes_there and not operands)
