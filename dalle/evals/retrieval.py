"""Finding the caption of an image and the image of a caption among all (Radford et al. 2021, section 3.1;
Table 13).

P images, C captions, E embedding width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = (1, 5, 10)


def retrieval(images: Tensor, captions: Tensor, owners: Sequence[int], first: Sequence[int] = FIRST) -> dict:
    """R@k both ways: the share of queries whose right answer is among the k with the highest cosine.

    An image with several captions is served by any of them. Ties count against the model, so that a CLIP
    which gives every pair the same score finds nothing.

    Args:
        images: unit vectors (P, E).
        captions: unit vectors (C, E).
        owners: the image of each caption; every image must have one.
        first: the values of k.

    Returns:
        {"image_to_text_acc": {"R@1": share, ...}, "text_to_image_acc": {...}}; a k that all would reach is
        left out.
    """
    owner = torch.as_tensor(owners, device=images.device)
    if len(owner) != len(captions) or not len(captions):
        raise ValueError(
            f"{len(captions)} captions of {len(owner)} owners; expected one owner each, and one or more"
        )
    if not torch.equal(owner.unique(), torch.arange(len(images), device=images.device)):
        raise ValueError(f"the captions do not belong to {len(images)} images: each must have a caption")
    own = owner == torch.arange(len(images), device=images.device)[:, None]  # (P, C)
    cosines = images @ captions.T
    best_own = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    before_caption = ((cosines >= best_own) & ~own).sum(1)  # wrong ones at least as near
    right = cosines[owner, torch.arange(len(captions), device=images.device)]
    before_image = ((cosines >= right) & ~own).sum(0)
    return {
        "image_to_text_acc": _shares(before_caption, first, len(captions)),
        "text_to_image_acc": _shares(before_image, first, len(images)),
    }


def _shares(before: Tensor, first: Sequence[int], among: int) -> dict[str, float]:
    return {f"R@{k}": float((before < k).double().mean()) for k in first if k < among}
