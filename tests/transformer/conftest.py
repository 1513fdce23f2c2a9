"""Fixtures of the transformer's tests."""

import pytest

from dalle.masks import KINDS
from dalle.transformer import TransformerConfig
from tests.helpers.small_transformer import ids_of, small


@pytest.fixture
def model():
    return small()


@pytest.fixture
def ids(model):
    return ids_of(model)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """The kind of every layer."""
    monkeypatch.setattr(TransformerConfig, "kinds", property(lambda config: [request.param] * config.depth))
    return request.param
