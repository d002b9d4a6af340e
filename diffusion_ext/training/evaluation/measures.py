"""How alike two sets of images are, by their features or their pixels; in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bars import SILENT, Bar

NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019
AT_ONCE = 1024  # rows of a table of distances


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁-μ₂|² + tr(C₁ + C₂ - 2√(C₁C₂)), of the normal distributions of features [N, n], [M, n]
    (Dowson & Landau 1982; Heusel et al. 2017).

    Raises: ValueError for fewer than two rows.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"features: wanted two and more, got {len(first)} and {len(second)}")
    first, second = first.double(), second.double()
    c1, c2 = first.T.cov(), second.T.cov()
    # tr √(C₁C₂) = the sum of the roots of the eigenvalues of √C₁ C₂ √C₁, which is symmetric.
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return (shift + c1.trace() + c2.trace() - 2 * product).item()


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """(precision, recall): the share of the generated features [N, n] that lie within the real ones
    [M, n], and the other way round; within: not farther from one of them than its third neighbour
    (Kynkäänniemi et al. 2019).

    Raises: ValueError for four rows or fewer.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS + 1:
        raise ValueError(f"features: wanted five and more, got {len(generated)} and {len(real)}")
    return _within(generated, real), _within(real, generated)


def _within(points: Tensor, others: Tensor) -> float:
    # The nearest to each of the others is itself.
    radii = torch.cat([d.kthvalue(NEIGHBOURS + 1, 1).values for d in _distances(others, others)])
    inside = [(d <= radii).any(1) for d in _distances(points, others)]
    return torch.cat(inside).double().mean().item()


@dataclass(frozen=True)
class Nearest:
    """For each image, its distance from the nearest of some others, the root of the mean square
    difference of pixels, [N], and which one that is, int64 [N]."""

    distance: Tensor
    index: Tensor


def nearest(images: Tensor, others: Tensor, bar: Bar = SILENT) -> Nearest:
    """The nearest of others [M,C,S,S] to each of images [N,C,S,S], by the distance of pixels."""
    found = [d.min(1) for d in _distances(images.flatten(1), others.flatten(1), bar)]
    size = images.shape[1:].numel()
    distance = torch.cat([f.values for f in found]) / size**0.5
    return Nearest(distance, torch.cat([f.indices for f in found]))


def _distances(points: Tensor, others: Tensor, bar: Bar = SILENT):
    """The rows of a table of distances [N, M], some at a time."""
    points, others = points.double(), others.double()
    # Not by a product of matrices, which makes small distances inexact.
    exact = "donot_use_mm_for_euclid_dist"
    parts = bar(points.split(AT_ONCE), "nearest images", unit="part")
    return (torch.cdist(some, others, compute_mode=exact) for some in parts)
