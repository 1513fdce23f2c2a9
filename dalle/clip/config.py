"""Configuration of CLIP (Radford et al. 2021, Table 20)."""

from typing import Literal

from dalle.config import check_positive, configuration


@configuration
class CLIPConfig:
    """Shape of a CLIP with a vision transformer; the defaults are ViT-B/16 of Radford et al. (Table 20).

    The paper does not say which CLIP reranked its images.
    """

    embed_width: int = 512
    """Width of the shared space."""
    image_size: int = 224
    """Pixels on a side; other images are resized."""
    patch_size: int = 16
    """Pixels on a side of a patch."""
    vision_width: int = 768
    """Width of the vision transformer."""
    vision_layers: int = 12
    """Its layers."""
    vision_pool: Literal["class", "average"] = "class"
    """Image vector: the state of a class token (Radford et al.), or the average of all patches."""
    text_len: int = 77
    """Text ids, the end mark among them."""
    text_vocab: int = 16384
    """Ids of the text tokenizer."""
    text_width: int = 512
    """Width of the text transformer."""
    text_layers: int = 12
    """Its layers."""
    head_dim: int = 64
    """Width of a head, in both towers."""

    def __post_init__(self):
        check_positive(self, "embed_width", "image_size", "patch_size", "text_len", "text_vocab", "head_dim")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_dim:
                raise ValueError(f"{name} {getattr(self, name)} is no multiple of head_dim {self.head_dim}")
