"""DALLE-pytorch (lucidrains, version 1.6.6) at the shapes of our transformer: the baseline of benchmarks.

It trains in fp32, shifts tokens and rotates queries and keys by default, its MLP is GEGLU (3 matrices of
4 D x D, ours has 2), and it computes the logits of both vocabularies at every position.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

from dalle.transformer import TransformerConfig

ATTN_TYPES = ["axial_row", "axial_col", "axial_row", "axial_row"]
"""Layers of that package nearest to the paper's, repeated to the depth."""


class DallePytorchStep:
    """A model of that package with AdamW; a call is one training step.

    Raises:
        ValueError: the package is not installed, or the grid is not square with a side of a power of 2.
    """

    def __init__(self, config: TransformerConfig, batch_size: int, device: torch.device):
        rows, columns = config.grid
        self.model = _build(config).to(device)
        self.text = torch.randint(1, config.text_vocab, (batch_size, config.text_len), device=device)
        self.image = torch.randint(config.image_vocab, (batch_size, rows * columns), device=device)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        parameters = sum(p.numel() for p in self.trained)
        self.facts = {"parameters": parameters, "precision": "fp32", "attn_types": ATTN_TYPES}

    def __call__(self) -> None:
        loss = self.model(self.text, self.image, return_loss=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 4.0)
        self.optimizer.step()


class DallePytorchSampler:
    """A model of that package that samples the tokens of one image, with its cache.

    Its `generate_images(use_cache=True)` drops the cache unless guidance is on, so the model is called here
    as that function calls it, with the cache.
    """

    def __init__(self, config: TransformerConfig, device: torch.device):
        self.model = _build(config).to(device).eval()
        self.facts = {"precision": "fp32", "attn_types": ATTN_TYPES, "cache": True}
        self.text = torch.randint(1, config.text_vocab, (1, config.text_len), device=device)
        self.offset, self.codes = config.text_vocab + config.text_len, config.image_vocab

    @torch.no_grad()
    def __call__(self, tokens: int) -> torch.Tensor:
        """The first image tokens, int64 (1, tokens)."""
        image, cache = self.text[:, :0], {}
        for _ in range(tokens):
            logits = self.model(self.text, image, cache=cache)[:, -1, self.offset :]
            top = logits.topk(max(1, self.codes // 2), dim=-1)  # its own default: the likelier half
            sample = top.indices.gather(1, torch.multinomial(top.values.softmax(-1), 1))
            image = torch.cat([image, sample], dim=1)
        return image


def _build(config: TransformerConfig) -> torch.nn.Module:
    rows, columns = config.grid
    if rows != columns or rows & (rows - 1):
        raise ValueError(f"dalle-pytorch takes square grids of a power of 2, got {rows} x {columns}")
    try:
        with _stand_ins():
            package = importlib.import_module("dalle_pytorch")
    except ImportError as error:
        raise ValueError(f"cannot import dalle-pytorch ({error}); pip install dalle-pytorch==1.6.6") from None
    torch.manual_seed(0)
    vae = package.DiscreteVAE(
        image_size=2 * rows, num_layers=1, num_tokens=config.image_vocab, codebook_dim=8, hidden_dim=8
    )  # frozen and never called: ids come in
    return package.DALLE(
        dim=config.width,
        vae=vae,
        num_text_tokens=config.text_vocab,
        text_seq_len=config.text_len,
        depth=config.depth,
        heads=config.heads,
        dim_head=config.head_dim,
        attn_types=tuple(ATTN_TYPES),
    )


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules that its import needs and other packages no longer have."""
    resources = ModuleType("pkg_resources")
    resources.get_distribution = lambda name: SimpleNamespace(version="1.6.6")
    distributed = ModuleType("pytorch_lightning.utilities.distributed")
    distributed.rank_zero_only = lambda function: function
    absent = [module for module in (resources, distributed) if module.__name__ not in sys.modules]
    sys.modules.update({module.__name__: module for module in absent})
    try:
        yield
    finally:
        for module in absent:
            sys.modules.pop(module.__name__, None)
