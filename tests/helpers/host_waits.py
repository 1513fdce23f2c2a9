"""Operations for which the host waits for a GPU, counted on any device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
BY_MASK = {"index", "index_put", "index_put_"}
COPY = {"_to_copy", "copy_"}


class HostWaits(TorchDispatchMode):
    """Counts, by name, values that are read, shapes that depend on values, and copies between devices.

    With CPU tensors it cannot see what is no operation there: moves to the CPU, and `tolist` in a backward
    pass. `numpy` is not counted, which tensors of a GPU refuse.
    """

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.lists = _Lists(self.found)

    def __enter__(self) -> "HostWaits":
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        by_mask = name in BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READ or by_mask or (name in COPY and len({t.device for t in tensors}) > 1):
            self.found[name] += 1
        return out


class _Lists(TorchFunctionMode):
    def __init__(self, found: Counter[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.update(["tolist"] if function is Tensor.tolist else [])
        return function(*args, **(kwargs or {}))
