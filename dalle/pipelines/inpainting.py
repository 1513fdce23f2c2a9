"""Inpainting: known pixels of an image, and where it is generated (GLIDE, section 2.3 and figure 2)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from dalle.io.images import ImageSource, load_image, resize_center_crop, to_tensor
from dalle.pipelines.diffusion import Known
from dalle.pipelines.generation import Generation


@dataclass(frozen=True)
class KnownImage:
    """An image and a mask of one size."""

    image: Image.Image
    mask: Image.Image
    """Of mode L: 255 where the image is generated, 0 where it is kept."""

    def at(self, size: int, device: torch.device | str = "cpu") -> Known:
        """The center square at a model's size; a pixel is known if all that it is made of is kept."""
        pixels = to_tensor([resize_center_crop(self.image, size)])
        mask = ImageOps.fit(self.mask, (size, size), Image.Resampling.BOX)
        known = torch.from_numpy(np.asarray(mask) == 0).float()[None, None]
        return Known(((pixels * 255).round() / 127.5 - 1).to(device), known.to(device))


def known_image(model: Any, image: ImageSource, mask: ImageSource) -> KnownImage:
    """What `GLIDE.inpaint` keeps; arguments as there.

    Raises:
        ValueError: a mask of another size than the image, or one that keeps all of its center square.
    """
    image = load_image(image)
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.ndim == 2:
        white = mask
    else:
        white = np.asarray(load_image(mask).convert("L")) > 127
    if white.shape[::-1] != image.size:
        height, width = white.shape
        raise ValueError(f"mask is {width} x {height}, the image {image.width} x {image.height}; resize it")
    known = KnownImage(image, Image.fromarray(np.uint8(255) * white))
    if known.at(model.image_size).mask.all():
        raise ValueError("mask keeps the whole image; make it white where the image is to be generated")
    return known


def inpaint(model: Any, prompt: str, image: ImageSource, mask: ImageSource, **options) -> Generation:
    """As `generate`, keeping the pixels of an image where the mask is black (GLIDE, section 2.3).

    An inpainting U-Net reads them; any other is only held to them in every step, and blends less well.

    Args:
        image: its center square is resized to the model's size; an image of that size keeps its pixels.
        mask: of the image's size, white where it is generated; or bool (H, W), True there.
        options: as `generate`.
    """
    return model.generate(prompt, known=known_image(model, image, mask), **options)
