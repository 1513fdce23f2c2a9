"""Configuration and named sizes of the transformer (paper section 2.2, appendices B.1 and D)."""

from dalle.config import check_positive, configuration
from dalle.layout import TokenLayout
from dalle.masks import layer_kinds, visible
from dalle.nn import ATTENTION_BACKENDS


@configuration
class TransformerConfig:
    """Shape of the transformer; the defaults are the paper's 12 billion."""

    depth: int = 64
    """Attention layers; each is followed by an MLP (2.2)."""
    heads: int = 62
    """Attention heads (2.2)."""
    head_dim: int = 64
    """Width of a head (2.2); the model is heads * head_dim = 3968 wide."""
    text_len: int = 256
    """Text positions, start-of-text among them (2.2)."""
    grid: tuple[int, int] = (32, 32)
    """Rows and columns of image tokens (2.1)."""
    text_vocab: int = 16384
    """Text ids without the pads (2.2)."""
    image_vocab: int = 8192
    """Codes of the image tokenizer (2.1)."""
    conv_kernel: int = 11
    """Side of the convolutional mask of the last layer (2.2)."""
    sparse: bool = True
    """Row, column and conv layers (2.2); false makes every layer causal."""
    full_attention_every: int | None = None
    """Makes every n-th layer causal, counted from 1; not in the paper."""
    qk_norm: bool = False
    """LayerNorm without bias of each head's queries and keys (Dehghani et al. 2023); not in the paper."""
    init_scale: float = 0.125
    """Weights start as N(0, init_scale / sqrt(inputs)) (Child et al.)."""
    attention_backend: str = "auto"
    """How attention is computed: dense, sdpa, window, flex, or auto: by device (dalle/nn/attention.py)."""
    activation_checkpointing: bool = False
    """Activation checkpointing: recompute the inside of each resblock in the backward pass (2.4)."""

    def __post_init__(self):
        check_positive(self, "depth", "heads", "head_dim")
        if self.full_attention_every is not None and self.full_attention_every < 1:
            raise ValueError(f"full_attention_every must be positive, got {self.full_attention_every}")
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"unknown attention_backend {self.attention_backend!r}; "
                f"expected one of {', '.join(ATTENTION_BACKENDS)}"
            )
        if self.sparse:
            visible("conv", self.layout, self.conv_kernel)  # checks the kernel

    @property
    def width(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def layout(self) -> TokenLayout:
        """Lengths and offsets of the sequence."""
        return TokenLayout(self.text_len, self.grid, self.text_vocab, self.image_vocab)

    @property
    def kinds(self) -> list[str]:
        """Attention kind of each layer."""
        kinds = layer_kinds(self.depth) if self.sparse else ["causal"] * self.depth
        return [
            "causal" if self.full_attention_every and i % self.full_attention_every == 0 else k
            for i, k in enumerate(kinds, 1)
        ]


TEXT_WEIGHT = 1 / 8  # 2.2


@configuration
class TransformerLossConfig:
    """Loss of the transformer."""

    text_weight: float = TEXT_WEIGHT
    """Weight of the text tokens' cross-entropy; the image tokens' has the rest (2.2)."""
    z_weight: float = 0.0
    """Weight of the z-loss, the mean of log(Z)^2 of text and image tokens weighted as their cross-entropies;
    1e-4 in PaLM (Chowdhery et al. 2022); not in the paper."""

    def __post_init__(self):
        if self.z_weight < 0:
            raise ValueError(f"z_weight cannot be negative, got {self.z_weight}")
        if not 0 <= self.text_weight <= 1:
            raise ValueError(f"text_weight must lie in [0, 1], got {self.text_weight}")


# Only depth and heads differ; text, grid and vocabularies are the paper's. The three largest are those of
# appendix D.
SIZES: dict[str, TransformerConfig] = {
    "tiny": TransformerConfig(depth=4, heads=2),
    "60m": TransformerConfig(depth=12, heads=8),
    "120m": TransformerConfig(depth=12, heads=12),
    "350m": TransformerConfig(depth=24, heads=16),
    "1.3b": TransformerConfig(depth=24, heads=32),
    "2.8b": TransformerConfig(depth=64, heads=30),
    "5.6b": TransformerConfig(depth=64, heads=42),
    "12b": TransformerConfig(),
}
