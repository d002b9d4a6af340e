"""The Fréchet distance of Inception's features, FID (Heusel et al. 2017), by torchmetrics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .bars import SILENT, Bar

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names them
AT_ONCE = 64


def weights_file() -> Path | None:
    """Where torch.hub keeps Inception's weights; None where they are not: nothing is fetched."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    return file if file.is_file() else None


def inception_distance(samples: Tensor, real: Tensor, bar: Bar = SILENT) -> float | None:
    """FID of samples and real images, [N,C,S,S] in [-1, 1] each; None where torchmetrics,
    torch-fidelity or Inception's weights are missing."""
    weights = weights_file()
    if weights is None:
        return None
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(weights))
    except ModuleNotFoundError:
        return None
    for images, are_real in ((real, True), (samples, False)):
        for some in bar(images.split(AT_ONCE), "Inception's features", unit="batch"):
            levels = some.clamp(-1, 1).add(1).mul(127.5).round().byte()
            metric.update(levels.expand(-1, 3, -1, -1), real=are_real)
    return metric.compute().item()
