"""Shape of a VQGAN (Esser et al. 2021, "Taming transformers")."""

from dalle.config import check_positive, configuration

GROUPS = 32  # of every group norm (release)
QUANTIZERS = ("nearest", "cosine", "logits")


@configuration
class VQGANConfig:
    """Shape of a VQGAN; the defaults are the published f16 with 16384 codes."""

    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Channels of each level, finest first; each but the first halves the image."""
    blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = (4,)
    """Levels whose blocks are each followed by attention."""
    latent: int = 256
    """Channels between encoder and codebook."""
    codebook_dim: int = 256
    """D, width of a code vector."""
    vocab_size: int = 16384
    """K, the number of codes."""
    quantizer: str = "nearest"
    """The code of a vector: the nearest, the one at the smallest angle ("cosine", LlamaGen), or
    the largest of K logits ("logits", Gumbel)."""

    def __post_init__(self):
        if self.quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if not 1 <= len(self.widths) <= 16:
            raise ValueError(f"widths must be of 1 to 16 levels, got {len(self.widths)}")
        if bad := [width for width in self.widths if width < GROUPS or width % GROUPS]:
            raise ValueError(f"widths must be positive multiples of {GROUPS}, got {bad[0]}")
        if any(level not in range(len(self.widths)) for level in self.attention):
            raise ValueError(f"attention must name levels below {len(self.widths)}, got {self.attention}")
        check_positive(self, "blocks", "latent", "codebook_dim", "vocab_size")

    @property
    def downsample_factor(self) -> int:
        """Pixels on a side of one token."""
        return 2 ** (len(self.widths) - 1)
