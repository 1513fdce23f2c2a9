"""KV caches of each kind of layer (paper Figure 11) against the masks (dalle/nn/kv_cache.py)."""

import pytest
import torch

from dalle.layout import TokenLayout
from dalle.masks import KINDS, dense_mask
from dalle.nn.kv_cache import KVCacheLayout, kv_cache_bytes
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.sizes import cache_bytes
from tests.helpers.small_transformer import SMALL

GRIDS = [(1, 3), (4, 4), (2, 5), (5, 3), (3, 8)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_keys_that_the_mask_shows_and_no_others(kind, grid):
    """Positions are written as a decoder writes keys, and read back."""
    layout = TokenLayout(4, grid, 5, 5)
    cache, mask = KVCacheLayout.of_kind(kind, layout, 3), dense_mask(kind, layout, 3)[4:, 4:]
    held = torch.full((cache.groups, cache.window), -1)
    for position in range(layout.num_image_tokens):
        held.view(-1)[cache.index[position]] = position
        seen = held[cache.group[position]][cache.sees[position]]
        assert sorted(seen.tolist()) == mask[position].nonzero().flatten().tolist()
        assert cache.num_read[position] == 1 + max(cache.sees[position].nonzero().flatten().tolist())


def test_at_paper_size_a_step_reads_33_or_32_or_192_keys():
    layouts = {kind: KVCacheLayout.of_kind(kind, TokenLayout()) for kind in KINDS}
    sizes = {kind: (layout.groups, layout.window) for kind, layout in layouts.items()}
    assert sizes == {"row": (1, 33), "column": (32, 32), "conv": (1, 192), "causal": (1, 1024)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full_attention_every", [None, 3])
@pytest.mark.parametrize("grid", GRIDS[1:], ids=str)
def test_memory_by_formula_is_memory_as_measured(grid, full_attention_every, dtype):
    config = TransformerConfig(depth=4, grid=grid, full_attention_every=full_attention_every, **SMALL)
    model = Transformer(config).to(dtype)
    caches = model.init_kv_caches(3, 5)
    keys = torch.zeros(3, 2, config.text_len + 1, 8, dtype=dtype)
    for cache in caches:
        cache.prefill(keys, keys, config.text_len)
    assert kv_cache_bytes(caches) == cache_bytes(config, dtype.itemsize)


def test_a_candidate_of_the_papers_model_takes_288_megabytes():
    """47 row layers of 33 keys, 16 column layers of 1,024 and the conv layer's 192, 3,968 wide, in 16 bit."""
    text, image = cache_bytes(TransformerConfig(), 2)
    assert image == 2 * 2 * 3968 * (47 * 33 + 16 * 1024 + 192) == 287_711_744
    assert text == 2 * 2 * 3968 * 64 * 256
