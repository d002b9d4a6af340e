"""Whether pictures that are mirrored, left to right, are still pictures of their kind."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import ImageData, LazyData

LEAST, MOST = 50, 1000  # images that are looked at; fewer show nothing
SIDE = 8  # pixels, that they are made smaller to: shapes are compared, not noise
NEARLY = 0.05  # farther from the others, by this share, mirrored images may be


def looks_the_same_mirrored(data: ImageData | LazyData) -> bool:
    """Whether mirrored images surely lie as near to the others of their class as the images do.

    Each image's distance from the nearest other one is compared before and after mirroring; surely
    means beyond two standard errors. It is False for letters, and for faces that the light falls on
    from one side.
    """
    if not isinstance(data, ImageData):  # reading it would take time, and many need no mirroring
        return False
    chosen = np.linspace(0, len(data) - 1, min(len(data), MOST)).round().astype(np.int64)
    images, contexts = data.images[chosen], data.contexts[chosen]
    small = F.adaptive_avg_pool2d(images, min(SIDE, images.shape[-1]))
    mirrored, itself = (_nearest(x, small, contexts) for x in (small.flip(3), small))
    told = mirrored.isfinite() & (itself > 0) & (mirrored > 0)  # not alone, nor there twice
    if told.sum() < LEAST:
        return False
    farther = (mirrored[told] / itself[told]).log()
    return bool(farther.mean() + 2 * farther.std() / len(farther) ** 0.5 < NEARLY)


def _nearest(x: Tensor, images: Tensor, contexts: Tensor) -> Tensor:
    """[N]: of each of x [N,C,H,W], the distance from the images of its context but its own."""
    distance = torch.cdist(x.flatten(1), images.flatten(1))
    other = torch.cdist(contexts.flatten(1), contexts.flatten(1)) > 0
    return distance.masked_fill(other, torch.inf).fill_diagonal_(torch.inf).min(1).values
