"""How recognisable generated digits are, to a classifier that has seen real ones only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

HELD_OUT = 0.2  # of the real digits, to measure the classifier on


@dataclass(frozen=True)
class Recognition:
    """generated: the share recognised as the class asked for. held_out: of real digits unseen."""

    generated: float
    held_out: float


def recognise_digits(images: Tensor, labels: Tensor) -> Recognition:
    """Trains a support vector classifier on real digits and applies it to generated ones.

    Args:
        images: [B, 1, 8, 8] in [-1, 1] (clipped).
        labels: int64 [B], the classes asked for.

    Raises: ImportError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC
    except ImportError as error:
        raise ImportError(
            "recognition wants scikit-learn: pip install 'diffusion_ext[demo]'"
        ) from error
    pixels, classes = load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    seen, unseen, seen_classes, unseen_classes = train_test_split(
        pixels, classes, test_size=HELD_OUT, random_state=0, stratify=classes
    )
    classifier = SVC(gamma=0.001, C=10.0).fit(seen, seen_classes)
    generated = images.float().clamp(-1, 1).add(1).mul(8).flatten(1).cpu().numpy()
    return Recognition(
        generated=classifier.score(generated, labels.cpu().numpy()),
        held_out=classifier.score(unseen, unseen_classes),
    )
