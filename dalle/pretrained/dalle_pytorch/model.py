"""dalle.pt of DALLE-pytorch (lucidrains), version 1.6: the transformer and the image tokenizer inside.

Against our transformer: a learned scale on each residual branch, GEGLU, a quarter of each state taken from
the token above and a quarter from the left (half from the left in text), rotated queries, keys and values,
row and column masks that end at the own row or column, a 5 x 5 mask, and two trunks in a "reversible" model.

Heads and kinds of layers are in the file's `hparams`. Versions before 1.6 differ under the same names
(shifts, masks, positions) and are refused. The text tokenizer, CLIP's by default, is not in the file.

    B batch, n inputs of this call, N image tokens, D width, W columns
"""

from itertools import cycle, islice
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.config import configuration
from dalle.nn.blocks import FP32LayerNorm
from dalle.nn.kv_cache import CachePosition, KVCache
from dalle.pretrained.dalle_pytorch.vae import LICENSE
from dalle.pretrained.external_blocks import MLP, Layer, SandwichBlock
from dalle.pretrained.external_transformer import ExternalConfig, ExternalLayout, ExternalTransformer
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, hparam

KINDS = ("full", "axial_row", "axial_col", "conv_like")
CONV_KERNEL = 5  # the package has no other
Trunks = tuple[Tensor, Tensor]


@configuration(kw_only=True)
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
        quarter, slot = x.shape[1] // 4, position % columns
        above = states.index_select(1, slot)[:, 0, :quarter]
        left = states.index_select(1, (position - 1) % columns)[:, 0, quarter:] * (slot != 0)
        states.index_copy_(1, slot, x[:, None, : 2 * quarter].to(states.dtype))
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
    """scale * f(shifted norm(x)), in a sandwich normed before the scale."""

    def __init__(self, config: DallePytorchConfig, f: nn.Module):
        super().__init__(config, f)
        self.scale = nn.Parameter(torch.ones(1, 1, config.width))
        self.branch, self.columns = int(isinstance(f, MLP)), config.shift_columns  # of ShiftCache

    def forward(
        self, x: Tensor, mask: Tensor, prefix_len: int, cache: ShiftCache | None, angles: Tensor | None
    ) -> Tensor:
        """x (B, n, D) and the other arguments of `Attention.forward`."""
        x = self.norm(x)
        if cache is not None:
            cache.fill_states(self.branch, x[:, prefix_len:])
        if self.columns:
            x = shifted(x, prefix_len, self.columns)
        return self.norm_out(self.f(x, mask, prefix_len, cache, angles)) * self.scale

    def step(self, x: Tensor, cache: ShiftCache, at: CachePosition, angles: Tensor | None) -> Tensor:
        """x (B, D) of one image token of every candidate."""
        x = self.norm(x)
        if self.columns:
            x = cache.shifted(self.branch, x, torch.as_tensor(at.position, device=x.device).view(1))
        return self.norm_out(self.f.step(x.to(self.dtype), cache, at, angles)) * self.scale[0]


class ReversibleLayer(Layer):
    """Attention of the second trunk is added to the first, the MLP of the first to the second."""

    def forward(self, trunks: Trunks, *rest) -> Trunks:
        first = trunks[0] + self.attention(trunks[1], *rest)
        return first, trunks[1] + self.mlp(first, *rest)

    def step(self, trunks: Trunks, *rest) -> Trunks:
        first = trunks[0] + self.attention.step(trunks[1], *rest)
        return first, trunks[1] + self.mlp.step(first, *rest)


class DallePytorch(ExternalTransformer):
    """The package's DALLE, without its image tokenizer."""

    def __init__(self, config: DallePytorchConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        if config.shared:
            self.text_embedding = self.image_embedding = None
        if config.rotary:
            self.register_buffer("angles", torch.zeros(1, layout.seq_len + 1, config.rotary))
        else:
            self.text_position = nn.Embedding(layout.text_inputs, width)
            shapes = (1, layout.rows, 1, width), (1, 1, layout.columns, width)
            self.image_position = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.final_norm = FP32LayerNorm(width)
        self.to_logits = nn.Linear(width, layout.vocab)

    def embed_text(self, text: Tensor) -> Tensor:
        x = F.embedding(text, self.to_logits.weight) if self.config.shared else self.text_embedding(text)
        return x if self.config.rotary else x + self.text_position.weight[: text.shape[1]]

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weight, offset = self.to_logits.weight, self.layout.image_offset
        x = F.embedding(tokens + offset, weight) if self.config.shared else self.image_embedding(tokens)
        if self.config.rotary:
            return x
        rows, columns = (part.flatten(0, 2) for part in self.image_position)
        return x + rows[positions // self.layout.columns] + columns[positions % self.layout.columns]

    def trunk(self, x: Tensor) -> Tensor | Trunks:
        return (x, x) if self.config.reversible else x

    def rotation(self, inputs: Tensor) -> Tensor | None:
        return self.angles[0].index_select(0, inputs) if self.config.rotary else None

    def final(self, x: Tensor | Trunks) -> Tensor:
        x = sum(x) / 2 if self.config.reversible else x
        return self.final_norm(x / x.amax(dim=-1, keepdim=True) if self.config.stable else x)

    def new_layer(self, config: DallePytorchConfig) -> Layer:
        return (ReversibleLayer if config.reversible else Layer)(config, ScaledBlock)

    def new_cache(self, *arguments) -> ShiftCache:
        return ShiftCache(*arguments, columns=self.config.shift_columns, width=self.config.width)


VERSION = "1.6."
INSIDE = "vae."
_LAYER = r"^transformer\.layers\.(?:layers|blocks)\.(\d+)\."
RENAMES = {
    rf"{_LAYER}(?:0|f\.net)\.(?:fn\.)*": r"layers.\1.attention.",
    rf"{_LAYER}(?:1|g\.net)\.(?:fn\.)*": r"layers.\1.mlp.",
    r"\.to_qkv\.": ".f.qkv.0.",
    r"\.to_out\.0\.": ".f.out.",
    r"\.net\.0\.": ".f.expand.",
    r"\.net\.3\.": ".f.project.",
    r"^(text|image)_emb\.": r"\1_embedding.",
    r"^text_pos_emb\.": "text_position.",
    r"^transformer\.pos_emb$": "angles",
    r"^image_pos_emb\.weights[._]": "image_position.",
    r"^to_logits\.0\.": "final_norm.",
    r"^to_logits\.1\.": "to_logits.",
}


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> DallePytorchConfig:
    """Sizes from the file's hyper-parameters and the shapes; ValueError for what is not supported."""
    hparams = found.tree.get("hparams") if isinstance(found.tree, dict) else None
    if not isinstance(hparams, dict):
        raise ValueError("it has no hparams, which name heads and kinds of layers")
    if not str(version := found.tree.get("version")).startswith(VERSION):
        which = f"version {version!s:.20}" if version else "a version before 1.0 (it names none)"
        raise ValueError(f"it is of {which}; only {VERSION}x is supported")
    text_len, depth, width = (hparam(hparams, name) for name in ("text_seq_len", "depth", "dim"))
    text_vocab = hparam(hparams, "num_text_tokens", 10000)
    layers = sum(name.endswith(".attention.scale") for name in shapes)
    if (depth, width) != (layers, shapes["final_norm.weight"][0]):
        raise ValueError(f"hparams has {depth} layers of width {width}, the tensors {layers} or another")
    rotary = shapes.get("angles")
    side = isqrt(max(0, rotary[1] - text_len - 1)) if rotary else shapes["image_position.0"][1]
    kinds = hparams.get("attn_types") or ("full",)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return DallePytorchConfig(
        width=width,
        heads=hparam(hparams, "heads", 8),
        head_dim=hparam(hparams, "dim_head", 64),
        kinds=tuple(islice(cycle(map(str, kinds)), depth)),
        text_len=text_len,
        grid=(side, side),
        text_vocab=text_vocab,
        image_vocab=shapes["to_logits.weight"][0] - text_vocab - text_len,
        shift=bool(hparams.get("shift_tokens", True)),
        rotary=rotary[2] if rotary else 0,
        sandwich=bool(hparams.get("sandwich_norm", False)),
        reversible=bool(hparams.get("reversible", False)),
        stable=bool(hparams.get("stable", False)),
        shared=bool(hparams.get("share_input_output_emb", False)),
    )


FAMILY = CheckpointFormat(
    name="DALLE-pytorch",
    kind="transformer",
    license=LICENSE,
    key_patterns=(
        "to_logits.1.weight",
        "*_emb.*weight",
        "transformer.layers.*to_qkv.weight",
        "transformer.layers.*net.3.weight",
    ),
    infer_config=infer_config,
    build=DallePytorch,
    renames=lambda names: RENAMES,
    ignored=(f"{INSIDE}*", "text_emb.linear.*", "image_emb.linear.*", "logits_mask"),
)
