"""A context that is a tensor: vectors, or class labels in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_in_range, shown


def are_labels(context) -> bool:
    """Whether a context is class labels, int64 [B]."""
    return isinstance(context, Tensor) and context.dtype == torch.int64 and context.dim() == 1


def one_hot(name: str, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """[B, classes] of dtype on the labels' device: 1 at each one's label, 0 elsewhere.

    Args: name: what errors call the labels, int64 [B].
    Raises: ValueError for labels beyond the classes. Those on a GPU are not waited for: there the
    lookup traps, as torch's own indexing does.
    """
    check_in_range(name, labels, 0, classes - 1)
    vectors = torch.eye(classes, dtype=dtype, device=labels.device)
    return vectors.index_select(0, labels)


def no_context(name: str, context, batch: int, width: int | str) -> str:
    """What an error says of a context that is neither labels nor vectors."""
    hint = ""
    if isinstance(context, Tensor) and context.dim() == 1 and context.dtype != torch.int64:
        hint = f"; {name}.long() has its numbers as labels"
    return (
        f"{name}: wanted class labels, int64 [{batch}], or vectors, floats [{batch}, {width}], got "
        f"{shown(context)}{hint}"
    )
