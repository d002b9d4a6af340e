"""How good a run's samples are, beside real images that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import counted
from .bars import SILENT, Bar
from .features import FEATURES, Judge, RealImages
from .inception import inception_distance
from .measures import NEIGHBOURS, Nearest, frechet_distance, nearest, precision_recall

COPY_PERCENTILE = 0.01  # of the distances of held-out images, below which a sample counts as a copy
LEAST_NORMAL, LEAST_NEIGHBOURS = 2, NEIGHBOURS + 2  # images, of those measures
FEW = 100  # real images, of which a classifier learns little


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found. In brackets: of real images held out, in the samples' place. What
    could not be measured is None, and `remarks` say why.

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
        remarks: what was not measured, and what is a rough figure, in sentences.
        nearest: of each sample.
    """

    images: int
    recognised: float | None
    classifier_accuracy: float | None
    frechet: float | None
    frechet_real: float | None
    inception: float | None
    precision: float | None
    recall: float | None
    precision_real: float | None
    recall_real: float | None
    nearest_median: float
    nearest_median_real: float | None
    copies: float | None
    copies_real: float | None
    feature_network: str
    remarks: tuple[str, ...]
    nearest: Nearest


def evaluate(
    samples: Tensor, labels: Tensor | None, real: RealImages, judge: Judge, bar: Bar = SILENT
) -> Evaluation:
    """Measures samples beside real images.

    Args:
        samples: [N,C,S,S] (clipped to [-1, 1]). labels: int64 [N], the classes asked for, or None.
        judge: train_judge(real). bar: shows how far each measure has come.
    """
    samples = samples.detach().cpu().float().clamp(-1, 1)
    trained, held, made = (
        judge.features(images, bar) for images in (real.trained, real.held_out, samples)
    )
    recognised = None
    if judge.of_classes and labels is not None:
        recognised = (judge.classes(samples) == labels.cpu()).double().mean().item()
    of_real = nearest(real.held_out, real.trained, bar)
    seen = torch.cat([real.trained, real.held_out]) if real.seen_by_run else real.trained
    of_samples = nearest(samples, seen, bar)
    told = not real.seen_by_run and len(held) > 0
    limit = of_real.distance.quantile(COPY_PERCENTILE) if told else torch.nan
    kind = "the data's classes" if judge.of_classes else "how images are turned"
    precision, recall = _precision_recall(made, trained)
    precision_real, recall_real = _precision_recall(held, trained)
    return Evaluation(
        images=len(samples),
        recognised=recognised,
        classifier_accuracy=judge.accuracy if judge.of_classes else None,
        frechet=_frechet(made, trained),
        frechet_real=_frechet(held, trained),
        inception=inception_distance(samples, real.trained, bar),
        precision=precision,
        recall=recall,
        precision_real=precision_real,
        recall_real=recall_real,
        nearest_median=of_samples.distance.median().item(),
        nearest_median_real=of_real.distance.median().item() if len(held) else None,
        copies=_share_below(of_samples, limit) if told else None,
        copies_real=_share_below(of_real, limit) if told else None,
        feature_network=f"{FEATURES} features of a small network that tells {kind} on these data",
        remarks=_remarks(real, len(samples)),
        nearest=of_samples,
    )


def _frechet(some: Tensor, others: Tensor) -> float | None:
    few = min(len(some), len(others)) < LEAST_NORMAL
    return None if few else frechet_distance(some, others)


def _precision_recall(some: Tensor, others: Tensor) -> tuple[float | None, float | None]:
    few = min(len(some), len(others)) < LEAST_NEIGHBOURS
    return (None, None) if few else precision_recall(some, others)


def _remarks(real: RealImages, samples: int) -> tuple[str, ...]:
    """What was not measured for want of images, and what is a rough figure."""
    trained, held = len(real.trained), len(real.held_out)
    sets = {"image trained on": trained, "sample": samples, "image held out": held}
    remarks = []
    for name, count in sets.items():
        number = f"{counted(count, name)}, wanted"
        if count < LEAST_NORMAL:
            of = " of real images" if name == "image held out" else ""
            remarks.append(f"no Fréchet distance{of}: {number} {LEAST_NORMAL}")
        if count < LEAST_NEIGHBOURS:
            remarks.append(f"no precision and recall: {number} {LEAST_NEIGHBOURS}")
    if real.seen_by_run:
        remarks.append("no share of copies: the run held out no image (--validation 0.1)")
    if trained < FEW:
        images = counted(trained, "image")
        remarks.append(f"rough figures: the network of the features learnt from {images}")
    return tuple(remarks)


def _share_below(found: Nearest, limit: Tensor) -> float:
    return (found.distance < limit).double().mean().item()
