"""Retrieval of captions by images and of images by captions (Radford et al. 2021, section 3.1; Table 13).

P images, C captions, E embedding width
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def retrieval(
    images: Tensor, captions: Tensor, owners: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """R@k both ways: the share of queries whose answer is among the k highest cosines; ties count as misses.

    Args:
        images, captions: unit vectors (P, E) and (C, E).
        owners: the image of each caption; any caption of an image answers it, and every image must have one.
        ks: values of k; those that every query reaches are left out.
    """
    owner = torch.as_tensor(owners, device=images.device)
    if len(owner) != len(captions) or not len(captions):
        raise ValueError(f"{len(captions)} captions of {len(owner)} owners; expected one owner each")
    numbers = torch.arange(len(images), device=images.device)
    if not torch.equal(owner.unique(), numbers):
        raise ValueError(f"each of the {len(images)} images must have a caption")
    own = owner == numbers[:, None]  # (P, C)
    cosines = images @ captions.T
    best_own = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    wrong_captions = ((cosines >= best_own) & ~own).sum(1)  # at least as near as the best own caption
    answers = cosines.gather(0, owner[None])  # (1, C)
    wrong_images = ((cosines >= answers) & ~own).sum(0)
    return {
        "image_to_text_acc": _shares(wrong_captions, ks, len(captions)),
        "text_to_image_acc": _shares(wrong_images, ks, len(images)),
    }


def _shares(wrong: Tensor, ks: Sequence[int], among: int) -> dict[str, float]:
    return {f"R@{k}": float((wrong < k).double().mean()) for k in ks if k < among}
