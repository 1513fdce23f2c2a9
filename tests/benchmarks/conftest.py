"""A stand-in for the package dalle-pytorch that records its calls."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn


class Recorder(nn.Module):
    def __init__(self, **words):
        super().__init__()
        self.words, self.calls = words, []
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, text, image, return_loss=False, cache=None):
        if return_loss:
            self.calls.append((tuple(text.shape), tuple(image.shape)))
            return self.weight.square().sum()
        self.calls.append((tuple(text.shape), tuple(image.shape), cache))
        return torch.zeros(1, 1, 11 + 6 + 13)


@pytest.fixture
def _dalle_pytorch(monkeypatch):
    package = ModuleType("dalle_pytorch")
    package.DALLE, package.DiscreteVAE = Recorder, lambda **words: SimpleNamespace(**words)
    monkeypatch.setitem(sys.modules, "dalle_pytorch", package)
