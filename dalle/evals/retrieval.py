"""Finding the caption of a picture and the picture of a caption among all (Radford et al. 2021, section 3.1; Table 13).

P pictures, C captions, E embedding width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST = (1, 5, 10)


def retrieval(
    pictures: Tensor, captions: Tensor, owners: Sequence[int], first: Sequence[int] = FIRST
) -> dict:
    """R@k both ways: the share of queries whose right answer is among the k with the highest cosine.

    A picture with several captions is served by any of them. Ties count against the model, so that a CLIP which gives
    every pair the same score finds nothing.

    Args:
        pictures: unit vectors (P, E).
        captions: unit vectors (C, E).
        owners: the picture of each caption; every picture must have one.
        first: the values of k.

    Returns:
        {"picture_to_caption": {"R@1": share, ...}, "caption_to_picture": {...}}; a k that all would reach is left out.
    """
    owner = torch.as_tensor(owners, device=pictures.device)
    if len(owner) != len(captions) or not len(captions):
        raise ValueError(
            f"{len(captions)} captions of {len(owner)} owners; expected one owner each, and one or more"
        )
    if not torch.equal(owner.unique(), torch.arange(len(pictures), device=pictures.device)):
        raise ValueError(f"the captions do not belong to {len(pictures)} pictures: each must have a caption")
    own = owner == torch.arange(len(pictures), device=pictures.device)[:, None]  # (P, C)
    cosines = pictures @ captions.T
    best_own = cosines.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    before_caption = ((cosines >= best_own) & ~own).sum(1)  # wrong ones at least as near
    right = cosines[owner, torch.arange(len(captions), device=pictures.device)]
    before_picture = ((cosines >= right) & ~own).sum(0)
    return {
        "picture_to_caption": _shares(before_caption, first, len(captions)),
        "caption_to_picture": _shares(before_picture, first, len(pictures)),
    }


def _shares(before: Tensor, first: Sequence[int], among: int) -> dict[str, float]:
    return {f"R@{k}": float((before < k).double().mean()) for k in first if k < among}
