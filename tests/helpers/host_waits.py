"""Operations for which the host waits for a GPU, counted on any device."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READ = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
BY_MASK = {"index", "index_put", "index_put_"}
COPY = {"_to_copy", "copy_"}


class HostWaits(TorchDispatchMode):
    """Counts, by name, values that are read, shapes that depend on values, and copies between devices."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        by_mask = name in BY_MASK and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READ or by_mask or (name in COPY and len({t.device for t in tensors}) > 1):
            self.found[name] += 1
        return out
