"""Handwritten digits as training data."""

from __future__ import annotations

import torch

from .image_data import ImageData


def load_digits() -> ImageData:
    """The 1797 real handwritten digits that come with scikit-learn: [1797, 1, 8, 8], 10 classes."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'diffusion_ext[demo]'"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)  # [1797, 64] in 0..16, [1797]
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8 - 1
    return ImageData(images, torch.from_numpy(labels))
