"""Datasets of other libraries: torchvision's and their like, and Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .image_files import PictureReader
from .lazy import LazyData
from .value_range import parse_range, to_unit_range

IMAGES = ("image", "img", "pixel_values", "images")
LABELS = ("label", "labels", "fine_label", "class", "target")


def from_dataset(
    dataset: Any,
    size: int | None = None,
    class_names: tuple[str, ...] | None = None,
    value_range: str = "auto",
    background: str = "white",
    workers: int = 0,
    strict: bool = False,
) -> LazyData:
    """A dataset with a length and dataset[i], for Trainer; its images are read as needed.

    Args:
        dataset: items are an image, (image, label, ...), or a dict with one of the keys
            "image", "img", "pixel_values", and perhaps "label". An image is Pillow's, or a tensor
            or array: uint8 [H,W], [H,W,C] or [C,H,W], or floats, [C,H,W] as torchvision's ToTensor
            makes them.
        size: side that Pillow's images are cropped and resized to; default the first one's shorter
            side. Tensors and arrays keep theirs.
        class_names: of the labels; default what the dataset tells (`classes`, or the feature of the
            label). None of the two: no context.
        value_range: of floats, "LOW,HIGH"; auto is "0,1".
        background: see PictureReader. workers, strict: see LazyData.

    Raises: TypeError, ValueError for a first item that is none of these.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset: wanted one with a length, got {type(dataset).__name__}")
    source = DatasetSource(dataset, size, value_range, background)
    names = class_names if class_names is not None else _class_names(dataset, source.label_key)
    return LazyData(source, tuple(names), workers, strict)


class DatasetSource:
    """A dataset as a source of LazyData."""

    def __init__(self, dataset, size: int | None, value_range: str, background: str):
        if not len(dataset):
            raise ValueError("dataset: wanted at least one image, got none")
        self._dataset = dataset
        self._range = parse_range(value_range) or (0.0, 1.0)
        first = dataset[0]
        keys = list(first) if isinstance(first, Mapping) else []
        self.image_key = next((key for key in IMAGES if key in keys), None)
        self.label_key = next((key for key in LABELS if key in keys), None)
        if keys and self.image_key is None:
            raise ValueError(f"dataset: wanted an image under one of {IMAGES}, got keys {keys}")
        image, _ = self._parts(first)
        if isinstance(image, Image.Image):
            size = size or min(image.size)
            self._reader = PictureReader(size, background)
            channels = self._reader.pixels_of(image).shape[2]
            self.shape = (channels, size, size)
        else:
            self.shape = tuple(self._array(image).shape)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Tensor, Any]:
        image, label = self._parts(self._dataset[index])
        if isinstance(image, Image.Image):
            pixels = self._reader.pixels_of(image, self.shape[0])
            tensor = torch.from_numpy(np.moveaxis(pixels, 2, 0).copy())
        else:
            tensor = self._array(image)
        if tuple(tensor.shape) != self.shape:
            raise ValueError(
                f"image {index}: wanted the first one's shape {list(self.shape)}, "
                f"got {list(tensor.shape)}"
            )
        return tensor, label if isinstance(label, int) or label is None else np.asarray(label)

    def _parts(self, item) -> tuple[Any, Any]:
        """(image, label or None)"""
        if isinstance(item, Mapping):
            return item[self.image_key], item.get(self.label_key)
        if isinstance(item, (tuple, list)):
            return item[0], item[1] if len(item) > 1 else None
        return item, None

    def _array(self, image) -> Tensor:
        """uint8 or float32 in [-1, 1], [C,S,S]"""
        if not isinstance(image, (Tensor, np.ndarray)):
            raise TypeError(
                f"dataset: wanted images of Pillow, tensors or arrays, got {type(image).__name__}"
            )
        pixels = torch.as_tensor(image)
        if pixels.dim() == 2:
            pixels = pixels[None]
        elif pixels.dim() == 3 and pixels.shape[0] > 4 and pixels.shape[2] <= 4:
            pixels = pixels.permute(2, 0, 1)
        if pixels.dim() != 3 or pixels.shape[1] != pixels.shape[2]:
            raise ValueError(
                f"dataset: wanted square images [C, S, S], got shape {list(pixels.shape)}"
            )
        if pixels.dtype == torch.uint8:
            return pixels
        return torch.from_numpy(to_unit_range(pixels.numpy(), *self._range))


def _class_names(dataset, label_key: str | None) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and features is not None and label_key is not None:
        names = getattr(features[label_key], "names", None)
    return tuple(map(str, names)) if names is not None else ()
