"""The train-dvae command: its preset, and a device that is not there."""

import pytest
import torch

from dalle.config import CONFIGS
from tests.helpers.refusals import assert_refused


def test_the_dvae_takes_its_preset(script, tiny_presets, tmp_path):
    done = script("train_dvae")
    assert done.code == 0, done.err
    assert "no arguments: using --config" in done.out
    assert list((tmp_path / "runs" / "dvae").glob("reconstructions-*.png"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_named(script):
    assert_refused(
        script("train_dvae", "--config", CONFIGS / "dvae" / "shapes.yaml", "--device", "cuda"), "no cuda"
    )
