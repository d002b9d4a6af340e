"""Images as uint8 in a file that is mapped into memory: arrays too large to load, and the cache of
what took long to decode."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..held_files import patiently
from .arrays import check_numbers, contexts_of_array, find_layout, read_arrays
from .lazy import LazyData, Source
from .value_range import parse_range, recognised_range, to_unit_range

SEEN = 256  # images that tell the range of an array's values
BATCH = 256  # images decoded at once into a cache


def map_image_array(
    path: str | Path,
    labels: str | Path | None = None,
    layout: str = "auto",
    value_range: str = "auto",
    workers: int = 0,
) -> LazyData:
    """`load_image_array` of an .npy that is too large to load: only what is read comes to memory.

    Args, raises: as there; workers: see LazyData.
    """
    source = MappedArray(Path(path), labels and Path(labels), layout, value_range)
    return LazyData(source, source.class_names, workers, strict=True)


class _Mapped:
    """An .npy in a mapped file. A worker process that is not forked maps it for itself: an array is
    pickled whole."""

    def __init__(self, path: Path):
        self._pixels, _ = read_arrays(path, mmap=True)

    def __getstate__(self) -> dict:
        if not isinstance(self._pixels, np.memmap):  # of an .npz, which cannot be mapped
            return vars(self)
        return {**vars(self), "_pixels": self._pixels.filename}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if not isinstance(self._pixels, np.ndarray):
            self._pixels = np.load(self._pixels, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._pixels)


class MappedArray(_Mapped):
    """An .npy of images as a source of LazyData. Args: as `load_image_array`."""

    def __init__(self, path: Path, labels: Path | None, layout: str, value_range: str):
        super().__init__(path)
        check_numbers(self._pixels)
        if not self._pixels.size:
            raise ValueError("images: wanted at least one image, got none")
        self._layout = find_layout(self._pixels.shape, layout)
        self.shape = self._to_chw(self._pixels[0]).shape
        seen = self._pixels[:: max(len(self._pixels) // SEEN, 1)]
        self._range = parse_range(value_range) or recognised_range(seen)
        self._labels = None if labels is None else read_arrays(labels, name="labels")[0]
        features = 0
        if self._labels is not None:
            features = contexts_of_array(self._labels, len(self._pixels)).shape[1]
        self.class_names = tuple(map(str, range(features)))

    def read(self, index: int) -> tuple[Tensor, np.ndarray | None]:
        pixels = self._to_chw(self._pixels[index])
        if pixels.dtype != np.uint8 or self._range != (0, 255):
            pixels = to_unit_range(pixels, *self._range)
        label = None if self._labels is None else self._labels[index]
        return torch.from_numpy(np.array(pixels)), label

    def _to_chw(self, image: np.ndarray) -> np.ndarray:
        if image.ndim == 2:
            return image[None]
        return np.moveaxis(image, 2, 0) if self._layout == "NHWC" else image


class CachedSource(_Mapped):
    """A source whose images lie decoded in a mapped file, with the labels of the first reading."""

    def __init__(self, path: Path, record: dict):
        super().__init__(path)
        self._labels, self._failures = record["labels"], record["failures"]
        self._names = record.get("names")
        self.shape = self._pixels.shape[1:]

    def name_of(self, index: int) -> str:
        return self._names[index] if self._names else f"image {index}"

    def read(self, index: int) -> tuple[Tensor, int | None]:
        if str(index) in self._failures:
            raise ValueError(self._failures[str(index)])
        label = None if self._labels is None else self._labels[index]
        return torch.from_numpy(np.array(self._pixels[index])), label


def cached(data: LazyData, path: str | Path, progress: bool = True) -> LazyData:
    """A folder's data with its images in `path`, an .npy of uint8 [N,C,S,S] that is made where it
    is not there, and made anew where files have changed.

    Args: progress: show a bar while the images are decoded, by the data's workers.
    Raises: TypeError for other data; ValueError for a path that does not end in .npy.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"cache: wanted a file ending in .npy, got {path.name}")
    beside = path.with_suffix(".json")
    if not hasattr(data.source, "identity"):
        raise TypeError(f"cache: wanted a folder's data, got that of {type(data.source).__name__}")
    digest = data.source.identity()
    if path.exists() and beside.exists():
        record = json.loads(beside.read_text(encoding="utf-8"))
        if record["digest"] == digest:
            return _with(data, CachedSource(path, record))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    record = {"digest": digest, **_decode(data, partial, progress)}
    patiently(os.replace, partial, path)
    beside.write_text(json.dumps(record), encoding="utf-8")
    return _with(data, CachedSource(path, record))


def _with(data: LazyData, source: Source) -> LazyData:
    return LazyData(source, data.class_names, data.workers, data.strict, data.notes)


def _decode(data: LazyData, path: Path, progress: bool) -> dict:
    """Writes the images, and tells their labels and which could not be read."""
    shape = (len(data), *data.shape)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    order = [np.arange(i, min(i + BATCH, len(data))) for i in range(0, len(data), BATCH)]
    labels: list = [None] * len(data)
    bar = tqdm(total=len(data), desc="decoding", unit=" images", disable=None if progress else True)
    with bar:
        for index, read in zip(order, data.read(order), strict=True):
            images, of_images, kept, _ = read
            pixels[index[kept]] = images.numpy()
            if of_images is not None:
                for i, label in zip(index[kept].tolist(), of_images.tolist(), strict=True):
                    labels[i] = label
            bar.update(len(index))
    pixels.flush()
    return {
        "labels": labels if any(x is not None for x in labels) else None,
        "failures": {str(i): why for i, why in data.failures.items()},
        "names": [data.name_of(i) for i in range(len(data))],
    }
