"""Fixtures of the commands: tiny presets, and a text tokenizer of few captions."""

from dataclasses import replace

import pytest

from dalle import config
from dalle.commands.train_tokenizer import train_tokenizer
from dalle.runs import quickstart


@pytest.fixture
def few_captions(monkeypatch):
    """The text tokenizer learns from a few captions, not from a hundred thousand."""
    monkeypatch.setattr(
        quickstart, "train_tokenizer", lambda run: train_tokenizer(replace(run, captions=2000))
    )


@pytest.fixture
def tiny_presets(tiny_configs, few_captions, monkeypatch):
    """A command without arguments trains the tiny models."""
    monkeypatch.setattr(config, "CONFIGS", tiny_configs)
    monkeypatch.setattr(quickstart, "CONFIGS", tiny_configs)
