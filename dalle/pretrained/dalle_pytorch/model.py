"""The transformer of DALLE-pytorch (lucidrains, 1.6.6), for sampling.

Against ours: a learned scale on each residual branch, GEGLU, a quarter of each state taken from the token
above and a quarter from the left (half from the left in text), rotated queries, keys and values, row and
column masks that end at the own row or column, a 5 x 5 mask, and two trunks in a "reversible" model.

    B batch, n inputs of this call, N image tokens, D width, W columns
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.nn.blocks import FP32LayerNorm
from dalle.nn.kv_cache import KVCache
from dalle.pretrained.external_blocks import MLP, Attention, SandwichBlock
from dalle.pretrained.external_transformer import ExternalConfig, ExternalLayout, ExternalTransformer

KINDS = ("full", "axial_row", "axial_col", "conv_like")
CONV_KERNEL = 5  # the package has no other
Trunks = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class DallePytorchConfig(ExternalConfig):
    """Shape of the transformer; heads * head_dim may differ from the width."""

    gated: bool = True
    qkv_bias: bool = False
    kinds: tuple[str, ...]  # kind of mask of each layer, one of KINDS
    shift: bool = True  # states are mixed with those of the tokens above and to the left
    rotary: int = 0  # numbers of a head that are rotated; 0 for learned positions instead
    reversible: bool = False  # two trunks, averaged at the end
    stable: bool = False  # final states are divided by their largest number
    shared: bool = False  # tokens are embedded by rows of the output matrix

    def __post_init__(self):
        super().__post_init__()
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"layers of kind {unknown[0]!r} are not supported; known: {', '.join(KINDS)}")
        if self.shift and self.width % 4:
            raise ValueError(f"width must be a multiple of 4 where tokens are shifted, got {self.width}")

    @property
    def layout(self) -> ExternalLayout:
        return ExternalLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab, zero_is_pad=True)

    @property
    def shift_columns(self) -> int:
        """W, or 0 where nothing is shifted."""
        return self.grid[1] if self.shift else 0

    def image_mask(self, kind: str) -> Tensor:
        index = torch.arange(self.layout.num_image_tokens)
        row, column = index // self.grid[1], index % self.grid[1]
        up, left = row[:, None] - row, column[:, None] - column
        sees = {
            "full": torch.ones(len(index), len(index), dtype=torch.bool),
            "axial_row": up == 0,
            "axial_col": left == 0,
            "conv_like": (up < CONV_KERNEL) & (left >= 0) & (left < CONV_KERNEL),
        }
        return sees[kind] & (index[:, None] >= index)


class ShiftCache(KVCache):
    """A KV cache that also keeps the last W image states of both residual branches before the shift."""

    def __init__(self, *arguments, columns: int, width: int):
        super().__init__(*arguments)
        rows = self.captions * self.candidates
        self.states = [torch.zeros(rows, columns, width // 2, device=self.image.device) for _ in range(2)]

    def fill_states(self, branch: int, image: Tensor) -> None:
        """Stores the first image states (C, p, D) of each caption for all its candidates."""
        states = self.states[branch]
        columns = states.shape[1]  # 0 where nothing is shifted
        for position in range(max(0, image.shape[1] - columns), image.shape[1]):
            state = image[:, position, : states.shape[2]]
            states[:, position % columns] = state.repeat_interleave(self.candidates, 0)

    def shifted(self, branch: int, x: Tensor, position: Tensor) -> Tensor:
        """Stores states (B, D) of a position (1,) and mixes them with those above and to the left."""
        states, columns = self.states[branch], self.states[branch].shape[1]
        quarter = x.shape[1] // 4
        above = states.index_select(1, position % columns)[:, 0, :quarter]
        left = states.index_select(1, (position - 1) % columns)[:, 0, quarter:] * (position % columns != 0)
        states.index_copy_(1, position % columns, x[:, None, : 2 * quarter].to(states.dtype))
        return torch.cat([above, left, x[:, 2 * quarter :]], dim=1)


def shifted(x: Tensor, text_inputs: int, columns: int) -> Tensor:
    """States (B, n, D), each with half of the one before (text) or quarters from above and left (image)."""
    text, image = x[:, :text_inputs], x[:, text_inputs:]
    half, quarter = x.shape[2] // 2, x.shape[2] // 4
    text = torch.cat([F.pad(text[..., :half], (0, 0, 1, -1)), text[..., half:]], dim=2)
    above = F.pad(image[..., :quarter], (0, 0, columns, 0))[:, : image.shape[1]]
    left = F.pad(image[..., quarter:half], (0, 0, 1, 0))[:, : image.shape[1]]
    inside = torch.arange(image.shape[1], device=x.device) % columns != 0
    return torch.cat([text, torch.cat([above, left * inside[:, None], image[..., half:]], dim=2)], dim=1)


class ScaledBlock(SandwichBlock):
    """scale * f(shifted norm(x)), in a sandwich normed before the scale; `branch` indexes ShiftCache."""

    def __init__(self, config: DallePytorchConfig, f: nn.Module, branch: int):
        super().__init__(config, f)
        self.scale = nn.Parameter(torch.ones(1, 1, config.width))
        self.branch, self.columns = branch, config.shift_columns

    def forward(self, x: Tensor, prefix_len: int, cache: ShiftCache | None, *rest) -> Tensor:
        """x (B, n, D) of the first inputs and the other arguments of f."""
        x = self.norm(x)
        if cache is not None:
            cache.fill_states(self.branch, x[:, prefix_len:])
        if self.columns:
            x = shifted(x, prefix_len, self.columns)
        return self.norm_out(self.f(x, *rest)) * self.scale

    def step(self, x: Tensor, position: Tensor, cache: ShiftCache, *rest) -> Tensor:
        """x (B, D) of the image token at a position (1,) and the other arguments of f.step."""
        x = self.norm(x)
        if self.columns:
            x = cache.shifted(self.branch, x, position)
        x = x.to(self.dtype)
        return self.norm_out(self.f.step(x, *rest) if rest else self.f(x)) * self.scale[0]


class DallePytorchLayer(nn.Module):
    """Attention, then MLP, on one trunk or on two."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__()
        self.attention = ScaledBlock(config, Attention(config), 0)
        self.mlp = ScaledBlock(config, MLP(config), 1)
        self.reversible = config.reversible

    def forward(
        self, trunks: Trunks, mask: Tensor, prefix_len: int, cache: ShiftCache | None, angles: Tensor | None
    ) -> Trunks:
        """Both trunks (B, n, D) and the other arguments of `Attention.forward`."""
        rest = mask, prefix_len, cache, angles
        first = trunks[0] + self.attention(trunks[1], prefix_len, cache, *rest)
        return self._joined(first, trunks[1], self.mlp(first, prefix_len, cache))

    def step(
        self, trunks: Trunks, cache: ShiftCache, position: int | Tensor, angles: Tensor | None
    ) -> Trunks:
        """Both trunks (B, D) of one image token of every candidate."""
        at = torch.as_tensor(position, device=trunks[0].device).view(1)
        first = trunks[0] + self.attention.step(trunks[1], at, cache, cache, position, angles)
        return self._joined(first, trunks[1], self.mlp.step(first, at, cache))

    def _joined(self, first: Tensor, second: Tensor, added: Tensor) -> Trunks:
        return (first, second + added) if self.reversible else (first + added,) * 2


class DallePytorch(ExternalTransformer):
    """The package's DALLE, without its image tokenizer."""

    layer_class = DallePytorchLayer

    def __init__(self, config: DallePytorchConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        if not config.shared:
            self.text_embedding = nn.Embedding(layout.image_offset, width)
            self.image_embedding = nn.Embedding(layout.image_vocab, width)
        if config.rotary:
            self.register_buffer("angles", torch.zeros(1, layout.seq_len + 1, config.rotary))
        else:
            self.text_position = nn.Embedding(layout.text_inputs, width)
            shapes = (1, layout.rows, 1, width), (1, 1, layout.columns, width)
            self.image_position = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.final_norm = FP32LayerNorm(width)
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_text(self, text: Tensor) -> Tensor:
        shared, offset = self.config.shared, self.layout.image_offset
        x = F.embedding(text, self.to_logits.weight[:offset] if shared else self.text_embedding.weight)
        return x if self.config.rotary else x + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        shared, offset = self.config.shared, self.layout.image_offset
        x = F.embedding(tokens, self.to_logits.weight[offset:] if shared else self.image_embedding.weight)
        if self.config.rotary:
            return x
        rows, columns = (part.flatten(0, 2) for part in self.image_position)
        return x + rows[positions // self.layout.columns] + columns[positions % self.layout.columns]

    def trunk(self, x: Tensor) -> Trunks:
        """Both trunks."""
        return x, x

    def rotation(self, inputs: Tensor) -> Tensor | None:
        return self.angles[0].index_select(0, inputs) if self.config.rotary else None

    def final(self, trunks: Trunks) -> Tensor:
        x = sum(trunks) / 2 if self.config.reversible else trunks[0]
        return self.final_norm(x / x.amax(dim=-1, keepdim=True) if self.config.stable else x)

    def new_cache(self, *arguments) -> ShiftCache:
        return ShiftCache(*arguments, columns=self.config.shift_columns, width=self.config.width)
