"""Images that are read when a batch wants them, by worker processes: any number of them.

A source has `shape` (C, S, S), a length, and read(i) -> (image, label): the image uint8 [C,S,S], or
float32 in [-1, 1]; the label an int, a vector, or None. What it raises leaves the image out.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ...checks import moved
from ..interrupts import outlive_interrupts
from .image_data import Batch

LISTED = 20  # of the files left out


class Source(Protocol):
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, Any]: ...


class LazyData:
    """Data for Trainer that holds no image for longer than a batch takes.

    Args:
        source: where images are read from, a `Source`.
        class_names: of its labels, where it has any: contexts are one-hot. Labels that are vectors
            are contexts as they are.
        workers: processes that read ahead; 0 reads in this one. Where Python does not fork them
            (on Linux from 3.14 on, elsewhere always), the source has to be picklable.
        strict: an image that cannot be read is an error.
        notes: lines for people to read.

    Attributes: failures: index -> why an image that was asked for was left out.
    """

    def __init__(
        self,
        source: Source,
        class_names: tuple[str, ...] = (),
        workers: int = 0,
        strict: bool = False,
        notes: tuple[str, ...] = (),
    ):
        if not len(source):
            raise ValueError("data: no images")
        self.source, self.class_names, self.notes = source, tuple(class_names), notes
        self.workers, self.strict = workers, strict
        self.failures: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        return (len(self.class_names),) if self.class_names else None

    def name_of(self, index: int) -> str:
        """What people call an image: its file, where the source tells it."""
        named = getattr(self.source, "name_of", None)
        return named(index) if named else f"image {index}"

    def batches(self, indices: Iterable[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """A batch for each array of indices, without the images that cannot be read."""
        for images, labels, kept, whole in self.read(indices, device.type == "cuda"):
            yield Batch(
                to_float(moved(images, device)),
                self._contexts(labels, device),
                None if whole else moved(kept, device),
            )

    def read(
        self, indices: Iterable[np.ndarray], pin_memory: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor, bool]]:
        """For each array of indices its images [B,C,S,S] as they were read, their labels, their
        places [B] in the array, and whether that is all of them."""
        loader = DataLoader(
            _Reader(self.source),
            batch_sampler=_Once(indices),
            collate_fn=_as_it_is,
            num_workers=self.workers,
            worker_init_fn=_begin_worker,
            pin_memory=pin_memory,
        )
        for images, labels, kept, failures in self._started(loader):
            self._note(failures)
            yield images, labels, kept, not failures

    def _started(self, loader: DataLoader) -> Iterator:
        try:
            return iter(loader)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(
                f"data: workers={self.workers} wants images that can be sent to processes, got "
                f"{type(self.source).__name__}: {error}; workers=0 reads in this process"
            ) from error

    def _note(self, failures: dict[int, str]) -> None:
        for index, why in failures.items():
            if self.strict:
                raise ValueError(f"data: {why}")
            self.failures[index] = why

    def _contexts(self, labels: Tensor | None, device: torch.device) -> Tensor | None:
        classes = len(self.class_names)
        if labels is None or not classes:
            return None
        if labels.dim() > 1:
            return moved(labels.float(), device)
        labels = labels.long()
        if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
            raise ValueError(
                f"data: wanted labels from 0 to {classes - 1}, one for each of class_names, "
                f"got {labels.min()} to {labels.max()}"
            )
        return F.one_hot(moved(labels, device), classes).float()

    def left_out(self) -> list[str]:
        """Lines for people to read, of the images that could not be read so far."""
        if not self.failures:
            return []
        reasons = [f"  {self.failures[i]}" for i in sorted(self.failures)]
        more = len(reasons) - LISTED
        reasons[LISTED:] = [f"  and {more} more"] if more > 0 else []
        return [f"images left out, which cannot be read: {len(self.failures)}", *reasons]


def to_float(images: Tensor) -> Tensor:
    """uint8 [B,C,S,S] -> float32 in [-1, 1], channels_last; float32 stays as it is."""
    laid = images.contiguous(memory_format=torch.channels_last)
    return laid.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else laid


class _Once:
    """A batch sampler of batches that are iterated over once."""

    def __init__(self, indices: Iterable[np.ndarray]):
        self.indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.indices)


class _Reader(Dataset):
    """Whole batches: (images, labels or None, kept int64, index -> why it cannot be read)."""

    def __init__(self, source: Source):
        self.source = source

    def __getitems__(self, indices: list[int]):
        images, labels, kept, failures = [], [], [], {}
        for place, index in enumerate(indices):
            try:
                image, label = self.source.read(index)
            except Exception as error:  # decoders raise whatever a broken file makes them
                failures[index] = str(error)
                continue
            images.append(image)
            labels.append(label)
            kept.append(place)
        stacked = torch.stack(images) if images else torch.zeros(0, *self.source.shape)
        known = bool(labels) and labels[0] is not None
        return (
            stacked,
            torch.as_tensor(np.asarray(labels)) if known else None,
            torch.tensor(kept, dtype=torch.int64),
            failures,
        )


def _as_it_is(batch):
    return batch


def _begin_worker(_: int) -> None:
    outlive_interrupts()
