"""How good a run's samples are, beside real images that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .features import Judge, RealImages
from .inception import inception_distance
from .measures import Nearest, frechet_distance, nearest, precision_recall

COPY_PERCENTILE = 0.01  # of the distances of held-out images, below which a sample counts as a copy


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. In brackets: of real images held out, in the samples' place.

    Attributes:
        images: how many samples.
        recognised, [classifier_accuracy]: the share that a classifier takes for the class asked
            for; None where there are no classes.
        frechet, [frechet_real]: distance of features from those of the training images.
        inception: the same by Inception's features (FID); None where torchmetrics, torch-fidelity
            or the weights are missing.
        precision, recall, [precision_real, recall_real]: of features.
        nearest_median, [nearest_median_real]: distance from the nearest training image, by pixels.
        copies, [copies_real]: the share that is nearer to a training image than 99 % of the real
            images are; None where no image was held out of the run.
        feature_network: what the features are of.
        nearest: of each sample.
    """

    images: int
    recognised: float | None
    classifier_accuracy: float | None
    frechet: float
    frechet_real: float
    inception: float | None
    precision: float
    recall: float
    precision_real: float
    recall_real: float
    nearest_median: float
    nearest_median_real: float | None
    copies: float | None
    copies_real: float | None
    feature_network: str
    nearest: Nearest


def evaluate(samples: Tensor, labels: Tensor | None, real: RealImages, judge: Judge) -> Evaluation:
    """Measures samples beside real images.

    Args:
        samples: [N,C,S,S] (clipped to [-1, 1]). labels: int64 [N], the classes asked for, or None.
        judge: train_judge(real).

    Raises: ValueError for too few images.
    """
    samples = samples.detach().cpu().float().clamp(-1, 1)
    trained, held, made = map(judge.features, (real.trained, real.held_out, samples))
    precision, recall = precision_recall(made, trained)
    precision_real, recall_real = precision_recall(held, trained)
    recognised = None
    if judge.of_classes and labels is not None:
        recognised = (judge.classes(samples) == labels.cpu()).double().mean().item()
    of_samples, of_real = nearest(samples, real.trained), nearest(real.held_out, real.trained)
    if real.seen_by_run:
        of_samples = nearest(samples, torch.cat([real.trained, real.held_out]))
    limit = of_real.distance.quantile(COPY_PERCENTILE)
    kind = "the data's classes" if judge.of_classes else "how images are turned"
    return Evaluation(
        images=len(samples),
        recognised=recognised,
        classifier_accuracy=judge.accuracy if judge.of_classes else None,
        frechet=frechet_distance(made, trained),
        frechet_real=frechet_distance(held, trained),
        inception=inception_distance(samples, real.trained),
        precision=precision,
        recall=recall,
        precision_real=precision_real,
        recall_real=recall_real,
        nearest_median=of_samples.distance.median().item(),
        nearest_median_real=of_real.distance.median().item(),
        copies=None if real.seen_by_run else _share_below(of_samples, limit),
        copies_real=None if real.seen_by_run else _share_below(of_real, limit),
        feature_network=f"64 features of a small network that tells {kind} on these data",
        nearest=of_samples,
    )


def _share_below(found: Nearest, limit: Tensor) -> float:
    return (found.distance < limit).double().mean().item()
