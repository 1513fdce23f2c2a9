"""Configuration of the dVAE and of its loss (Sections 2.1, A.1, A.2)."""

from dalle.config import check_positive, configuration
from dalle.schedules import Schedule


@configuration
class DVAEConfig:
    """Shape of the dVAE; the defaults are the paper's."""

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Channels of each group of resblocks, finest first (A.1, release: 4 groups, n_hid 256)."""
    blocks_per_group: int = 2
    """Resblocks in a group (release)."""
    downsample_factor: int = 8
    """Pixels on a side of one token: a power of two, at most 2^(groups - 1) (2.1)."""
    vocab_size: int = 8192
    """K, the number of codes (2.1)."""
    codebook_dim: int = 128
    """Width of a code vector: output of the decoder's first 1x1 convolution (release)."""
    residual_scale: float | None = None
    """Factor on each residual path; None is 1 / (number of resblocks)^2 (A.1, release)."""
    logit_init_scale: float = 1.0
    """Initial size of the encoder's logits against the release's."""
    codebook_init_std: float | None = None
    """Initial standard deviation of the code vectors; None is 1 / sqrt(K) (release)."""
    min_log_scale: float | None = None
    """Floor on the predicted ln b; None leaves it free (A.3)."""

    def __post_init__(self):
        if len(self.widths) > 16:
            raise ValueError(f"widths must be of 16 groups at most, got {len(self.widths)}")
        if self.downsample_factor not in [2**poolings for poolings in range(len(self.widths))]:
            raise ValueError(
                f"downsample_factor must be a power of two up to {2 ** (len(self.widths) - 1)}, got "
                f"{self.downsample_factor} with {len(self.widths)} groups; add a width or lower it"
            )
        if bad := [w for w in self.widths if w < 4 or w % 4]:
            raise ValueError(f"widths must be positive multiples of 4 (bottleneck = width / 4), got {bad[0]}")
        check_positive(self, "blocks_per_group", "vocab_size", "codebook_dim")


@configuration
class DVAELossConfig:
    """Schedules of the relaxed evidence lower bound; the defaults are the paper's (A.2)."""

    tau: Schedule = Schedule(1.0, 1 / 16, 150_000)
    """Temperature of the relaxation (A.2)."""
    beta: Schedule = Schedule(0.0, 6.6, 5_000)
    """Weight of the KL (A.2)."""

    def __post_init__(self):
        if min(self.tau.initial, self.tau.final) <= 0:
            raise ValueError(f"tau must stay above 0, got {self.tau}")
