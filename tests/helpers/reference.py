"""Random weights and plain layers for the references of external models; nothing of dalle is used."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
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


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Callable[[int, int], bool]) -> Tensor:
    """(n, H, d) three times -> (n, H d); sees(query, key)."""
    mask = torch.tensor([[sees(query, key) for key in range(len(k))] for query in range(len(q))])
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(2)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
