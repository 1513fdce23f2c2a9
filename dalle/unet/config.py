"""Configuration of the U-Net (GLIDE; "ADM" of Dhariwal and Nichol 2021) and of the noised classifier."""

from typing import Literal

from dalle.config import check_positive, configuration

GROUPS = 32  # of every group norm (release)


@configuration
class EncoderConfig:
    """Shape of the half that a U-Net and a classifier share; the defaults are those of GLIDE's base model."""

    image_size: int = 64
    """Pixels on a side at which the sides of `attention` are meant; any multiple of 2^(levels - 1) works."""
    width: int = 192
    """Base channels; the embedding of time is four times as wide."""
    channel_mult: tuple[float, ...] = (1, 2, 3, 4)
    """Channels of each level over `width`, finest first; each but the first halves the image."""
    blocks: int = 3
    """Residual blocks of a level; the decoder has one more."""
    attention: tuple[int, ...] = (32, 16, 8)
    """Sides of the feature maps on which each residual block is followed by attention."""
    middle_attention: bool = True
    """Attention between the two residual blocks in the middle."""
    head_width: int = 64
    """Width of an attention head."""
    heads: int | None = None
    """Number of attention heads at every level, in place of `head_width`."""
    attention_order: Literal["legacy", "new"] = "legacy"
    """Order of the channels of queries, keys and values: (heads, 3, d), or (3, heads, d)."""
    scale_shift: bool = True
    """Adaptive group norm: the embedding scales and shifts; false only adds it."""
    dropout: float = 0.1
    """Dropout inside the residual blocks."""
    activation_checkpointing: bool = False
    """Activation checkpointing: recompute the inside of each block in the backward pass."""

    def __post_init__(self):
        check_positive(self, "image_size", "width", "blocks", "head_width", "heads")
        if not 1 <= len(self.channel_mult) <= 16:
            raise ValueError(f"channel_mult must be of 1 to 16 levels, got {len(self.channel_mult)}")
        if bad := [width for width in self.widths if width < GROUPS or width % GROUPS]:
            raise ValueError(f"channels of every level must be multiples of {GROUPS}, got {bad[0]}")
        if self.image_size % self.downsample_factor:
            raise ValueError(f"image_size {self.image_size} is no multiple of {self.downsample_factor}")
        sides = [self.image_size >> level for level in range(len(self.widths))]
        if bad := [side for side in self.attention if side not in sides]:
            raise ValueError(f"attention must name sides among {', '.join(map(str, sides))}, got {bad[0]}")
        for width, side in zip(self.widths, sides, strict=True):
            attends = side in self.attention or (self.middle_attention and side == sides[-1])
            if attends and width % (self.heads or self.head_width):
                parts = f"{self.heads} heads" if self.heads else f"heads of width {self.head_width}"
                raise ValueError(f"{width} channels do not divide into {parts}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(mult * self.width) for mult in self.channel_mult)

    @property
    def downsample_factor(self) -> int:
        """Pixels on a side of a position of the coarsest level."""
        return 2 ** (len(self.channel_mult) - 1)

    def attends(self, level: int) -> bool:
        """Whether the blocks of a level are followed by attention."""
        return self.image_size >> level in self.attention


@configuration
class DiffusionConfig:
    """What a U-Net is trained to do; the defaults are those of GLIDE's base model as released."""

    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule (`dalle.diffusion.make_schedule`)."""
    steps: int = 1000
    """Timesteps T."""
    prediction: Literal["noise", "x0", "v"] = "noise"
    """What the network predicts: the noise, x_0, or v = alpha noise - sigma x_0."""
    caption_dropout: float = 0.2
    """Share of the captions that training empties; classifier-free guidance needs it (GLIDE, section 2.3)."""

    def __post_init__(self):
        least = 21 if self.schedule == "linear" else 2
        if not least <= self.steps <= 2**16:
            raise ValueError(
                f"steps of a {self.schedule} schedule must be {least} to {2**16}, got {self.steps}"
            )
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout}")


@configuration
class UNetConfig(EncoderConfig):
    """Shape of the U-Net; the defaults are GLIDE's base model as released, 64 x 64 from text."""

    learned_variance: bool = True
    """Six output channels: the prediction, then the place of the variance in its range; else three."""
    text: Literal["ids", "clip", "none"] = "ids"
    """Text input: ids for a transformer of its own (GLIDE), states of a CLIP's text tower (Karlo), none."""
    text_len: int = 128
    """Text positions."""
    text_vocab: int = 50257
    """Text ids without the pads."""
    text_width: int = 512
    """Width of the text transformer, and of all that attention reads besides the image."""
    text_layers: int = 16
    """Layers of the text transformer."""
    text_heads: int = 8
    """Attention heads of the text transformer."""
    image_embedding: bool = False
    """Input of a CLIP's image embedding, added to time and read as four positions (unCLIP)."""
    embedding_width: int = 768
    """Width of the CLIP's embeddings and text states."""
    classes: int | None = None
    """Number of class labels; None is no label."""
    low_resolution: bool = False
    """Input of a smaller image, to upsample."""
    inpainting: bool = False
    """Input of known pixels and their mask."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Schedule, prediction, caption dropout."""

    def __post_init__(self):
        super().__post_init__()
        names = ("text_len", "text_vocab", "text_width", "text_layers", "text_heads")
        check_positive(self, *names, "embedding_width", "classes")
        if self.text == "ids" and self.text_width % self.text_heads:
            raise ValueError(f"text_width {self.text_width} does not divide into {self.text_heads} heads")

    @property
    def in_channels(self) -> int:
        """Channels of the noised image, of known pixels and mask, and of the smaller image."""
        return 3 + 4 * self.inpainting + 3 * self.low_resolution

    @property
    def kind(self) -> Literal["base", "upsampler"]:
        """Name of the model's part in a model directory."""
        return "upsampler" if self.low_resolution else "base"

    @property
    def variance(self) -> Literal["learned", "small"]:
        """Variance of a reverse step: the network's own, or that of the posterior."""
        return "learned" if self.learned_variance else "small"

    @property
    def out_channels(self) -> int:
        """3, or 6 with a learned variance."""
        return 6 if self.learned_variance else 3

    @property
    def context_width(self) -> int | None:
        """Width of what attention reads besides the image; None if that is nothing."""
        return self.text_width if self.text != "none" or self.image_embedding else None


@configuration
class ClassifierConfig(EncoderConfig):
    """Shape of the noised classifier; the defaults are guided diffusion's at 64 x 64."""

    width: int = 128
    blocks: int = 4
    dropout: float = 0.0
    classes: int = 1000
    """Number of classes."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "classes")
        if self.heads is not None:
            raise ValueError("a classifier pools by heads of head_width; heads must be None")
