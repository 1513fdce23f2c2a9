"""Checks that every external transformer passes (dalle/pretrained/external_transformer.py)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.pretrained.external_transformer import ExternalLayout, ExternalTransformer
from dalle.pretrained.family import DetectedCheckpoint, SkipRandomInit, compare_keys
from dalle.sampling import candidate_noise
from dalle.transformer.generate import cast_linear_weights, generate, inference_autocast, quantize_int8
from tests.helpers.device_work import step_work


def check_logits(found: Tensor, text: Tensor, image: Tensor, layout: ExternalLayout) -> None:
    """Logits (T + N, V) of one sequence are those of a reference: (<= T, text ids) and (N, codes)."""
    length, offset = layout.text_len, layout.image_offset
    torch.testing.assert_close(found[length - len(text) : length, :offset], text, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found[length:, offset:], image, atol=2e-4, rtol=2e-4)
    assert (found[:length, offset:] == -torch.inf).all()
    assert (found[length:, :offset] == -torch.inf).all()


def check_sampling(model: ExternalTransformer, text: Tensor, image: Tensor, read: int) -> None:
    """Sampling with KV caches agrees with whole passes; `read` image tokens are prefilled, two more read."""
    layout = model.layout
    ids, n = layout.pack(text, image), layout.num_image_tokens
    noise = torch.stack([candidate_noise(0, str(i), range(3), n) for i in range(2)])
    assert len(generate(model, text, noise, guidance=1.5).flatten(0, 1).unique(dim=0)) == 6
    for prefix in (None, image[:, :read]):
        tokens = generate(model, text, noise, prefix=prefix, temperature=0)
        start = 0 if prefix is None else read
        logits = model(layout.pack(text, tokens[:, 0]))[:, layout.text_len :, layout.image_offset :]
        assert torch.equal(tokens[:, 0, start:], logits.argmax(2)[:, start:])
        assert torch.equal(tokens[:, 0], tokens[:, 2])
        assert prefix is None or torch.equal(tokens[:, 1, :start], prefix)
    states = []
    for as_tensor in (False, True):
        caches = model.init_kv_caches(2, 1)
        model.prefill(layout.shift(ids[:, : layout.text_len + read]), caches)
        positions = [torch.tensor([i]) if as_tensor else i for i in (read + 1, read + 2)]
        states.append([model.decode_step(image[:, read + i], at, caches) for i, at in enumerate(positions)])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)
    assert step_work(model)["index"] <= 2 * len(model.image_masks) + 2  # tables, whatever the layers
    with torch.inference_mode():
        exact = model.hidden(ids)
        for rounded in (cast_linear_weights(model, torch.bfloat16), quantize_int8(model)):
            assert generate(rounded, text, noise).shape == noise.shape
            with inference_autocast(rounded):
                away = rounded.hidden(ids) - exact
            assert 0 < away.norm() < 0.1 * exact.norm()


def check_published(family, path: Path, names, config, parameters: int | None = None, masks=None) -> None:
    """A file with these names and the shapes of a configuration has that configuration."""
    with torch.device("meta"), SkipRandomInit():
        state = family.build(config).state_dict()
    names = family.rename(names)
    assert len(names) == len(state)
    tensors = {name: torch.empty(state[ours].shape, device="meta") for name, ours in names.items()}
    comparison = compare_keys(DetectedCheckpoint(path, family, tensors | (masks or {})))
    comparison.check("published")
    assert comparison.config == config
    assert parameters in (None, sum(p.numel() for p in comparison.model.parameters()))


def make_open_clip(embed_dim: int = 16, layers: int | tuple = 1, patch_size: int | None = 16, side: int = 32):
    """A small CLIP of the package open_clip, with the activation QuickGELU."""
    open_clip = pytest.importorskip("open_clip.model")
    vision = open_clip.CLIPVisionCfg(layers=layers, width=64, patch_size=patch_size, image_size=side)
    text = open_clip.CLIPTextCfg(context_length=16, vocab_size=49408, width=64, heads=1, layers=1)
    return open_clip.CLIP(embed_dim, vision, text, quick_gelu=True)


def open_clip_weights() -> dict[str, Tensor]:
    """State dict of a small CLIP."""
    torch.manual_seed(0)
    return make_open_clip().state_dict()


OPENAI_CLIP = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16)}
OPENAI_CLIP["vocab_size"] = torch.tensor(49408)
"""What OpenAI's files hold besides the weights."""
