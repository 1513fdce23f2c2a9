"""Random weights and plain attention for the references of external transformers; nothing of dalle is
used."""

from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


class RandomState(dict):
    """Random tensors by name, norms and biases too; torch.save wants a plain dict of it."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def put(self, name: str, *shape: int, around: float = 0.0) -> None:
        self[name] = around + 0.3 * torch.randn(*shape, generator=self.generator)

    def norm(self, name: str, width: int) -> None:
        self.put(f"{name}.weight", width, around=1.0)
        self.put(f"{name}.bias", width)

    def linear(self, name: str, n_out: int, n_in: int, *kernel: int, bias: bool = True) -> None:
        self.put(f"{name}.weight", n_out, n_in, *kernel)
        if bias:
            self.put(f"{name}.bias", n_out)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int], bool]) -> Tensor:
    """(n, H, d) three times -> (n, H d), one query at a time; sees(query, key)."""
    out = []
    for query in range(len(q)):
        seen = [key for key in range(len(k)) if sees(query, key)]
        weights = (torch.einsum("hd,khd->hk", q[query], k[seen]) / q.shape[-1] ** 0.5).softmax(1)
        out.append(torch.einsum("hk,khd->hd", weights, v[seen]).flatten())
    return torch.stack(out)
