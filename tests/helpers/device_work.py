"""Operations of a decoding step, counted and checked for what another device than the CPU cannot do."""

from collections import Counter
from contextlib import nullcontext
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {"view", "_unsafe_view", "t", "transpose", "select", "slice", "expand", "permute", "unsqueeze"}
VIEWS |= {"split", "split_with_sizes", "unbind", "detach", "alias", "lift_fresh"}


class DeviceWork(TorchDispatchMode):
    """Counts operations by name, without views, and fails on float64 off the CPU, which MPS lacks.

    The meta device stands for any other. It has no autocast, so there is none inside.

    Args:
        step: also fail on what waits for the device or copies to it, which no CUDA graph records.
    """

    def __init__(self, step: bool = False):
        super().__init__()
        self.step, self.counts = step, Counter()
        self.largest = 0  # bytes of a result that is no view

    def __enter__(self):
        self.patches = [
            mock.patch.object(torch, "autocast", return_value=nullcontext()),
            mock.patch.object(torch, "is_autocast_enabled", return_value=False),
        ]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
            self.largest = max(self.largest, getattr(result, "nbytes", 0))
        assert all(one.dtype != torch.float64 for one in tensors if one.device.type != "cpu"), name
        if self.step:
            assert len({one.device for one in tensors}) <= 1, f"{name} copies to the device"
            assert name not in ("nonzero", "_local_scalar_dense"), f"{name} waits for the device"
        return result


def step_work(model, device: str = "cpu") -> Counter:
    """Operations of a decoding step of a model on a device, at a position given as a tensor."""
    layout, model = model.layout, model.to(device)
    text, tokens = layout.pad_text([[1], [2]]), torch.zeros(6, dtype=torch.int64, device=device)
    with torch.no_grad():
        caches, position = model.init_kv_caches(2, 3), torch.ones(1, dtype=torch.int64, device=device)
        with DeviceWork():
            model.prefill(layout.shift(text.to(device)), caches)
        with DeviceWork(step=True) as work:
            model.decode_step(tokens, position, caches)
    return work.counts
