"""Images held in memory, with a context for each, and the batches that a training run takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...checks import moved


@dataclass(frozen=True)
class Batch:
    """Images [B,C,S,S], float32 in [-1, 1], and contexts [B,*], or None, on the device.

    kept: int64 [B], the places among those asked for of the images that could be read; None: all.
    """

    images: Tensor
    context: Tensor | None
    kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(eq=False)
class ImageData:
    """Images and their contexts.

    Args:
        images: float [N, C, S, S] in [-1, 1].
        contexts: int [N] class labels (made one-hot), or float [N, n_cfeat]; None for images
            without context, which get zeros [N, 1]. Floats of more dimensions, such as embedded
            texts [N, L, n], are for networks that take them.
        class_names: a name for each label or context feature; default their numbers, or none
            where there is no context.
        notes: lines for people to read, of what the files were taken for.
        files: the name of each image's file, where it has one.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    images: Tensor
    contexts: Tensor | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    conditional: bool = field(default=False, init=False)
    _there: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.images = _checked_images(self.images)
        if self.contexts is None:
            self.contexts, self.class_names = torch.zeros(len(self.images), 1), ()
            return
        self.contexts = checked_contexts(self.contexts, len(self.images), len(self.class_names))
        self.conditional = True
        if self.contexts.dim() > 2:  # embeddings, whose features have no names
            return
        if not self.class_names:
            self.class_names = tuple(str(i) for i in range(self.contexts.shape[1]))
        if len(self.class_names) != self.contexts.shape[1]:
            raise ValueError(
                f"class_names: wanted {self.contexts.shape[1]} names, one for each context "
                f"feature, got {len(self.class_names)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, S, S)"""
        return tuple(self.images.shape[1:])

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """Of one image's context; None where there is none."""
        return tuple(self.contexts.shape[1:]) if self.conditional else None

    def name_of(self, index: int) -> str:
        """What people call an image."""
        return self.files[index] if self.files else f"image {index}"

    def batches(self, indices: Iterable[np.ndarray], device: torch.device) -> Iterator[Batch]:
        """A batch for each array of indices. The images are brought to the device whole, once."""
        if device not in self._there:
            images = self.images.to(device, memory_format=torch.channels_last)
            self._there[device] = images, self.contexts.to(device)
        images, contexts = self._there[device]
        for index in indices:
            chosen = moved(torch.from_numpy(index), device)
            yield Batch(images[chosen], contexts[chosen] if self.conditional else None)


def _checked_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images: wanted shape [N, C, S, S], got {list(images.shape)}")
    if not images.numel():
        raise ValueError(f"images: wanted at least one image, got shape {list(images.shape)}")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1 and high <= 1):  # NaN fails this too
        raise ValueError(f"images: wanted values in [-1, 1], got {low:g} to {high:g}")
    return images.float()


def checked_contexts(contexts: Tensor, count: int, classes: int, name: str = "contexts") -> Tensor:
    if contexts.ndim < 1 or len(contexts) != count:
        raise ValueError(
            f"{name}: wanted labels [{count}] or vectors [{count}, n_cfeat], "
            f"got shape {list(contexts.shape)}"
        )
    if contexts.ndim > 1:
        return contexts.float()
    if contexts.is_floating_point() or contexts.min() < 0:
        found = contexts[:5].tolist()
        raise ValueError(
            f"{name}: wanted labels 0, 1, ..., got {contexts.dtype}, the first {found}"
        )
    return F.one_hot(contexts.long(), max(classes, int(contexts.max()) + 1)).float()
