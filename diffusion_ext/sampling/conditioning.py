"""What a model is conditioned on: tensors, alone or in a structure; doubled for guidance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..checks import moved


def as_context(model, context, batch: int, device, dtype, name: str = "context"):
    """A context on the sample's device, its floats in the sample's dtype.

    Args:
        context: None; floats [B, ...]; int64 labels [B], which become one-hot of model.n_cfeat; or
            a dict, tuple or list of tensors [B, ...] and whatever else the model takes.

    Raises: TypeError, ValueError for a tensor that is not of B rows.
    """
    if context is None:
        return None
    if not isinstance(context, Tensor):
        leaves = pytree.tree_leaves(context)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(
                f"{name}: wanted a tensor, a dict, tuple or list of them, or None, "
                f"got {type(context).__name__}"
            )
        return pytree.tree_map(lambda leaf: _placed(name, leaf, batch, device, dtype), context)
    if context.shape[:1] != (batch,):
        raise ValueError(f"{name}: wanted {batch} rows (the batch), got {list(context.shape)}")
    if context.dtype == torch.int64 and context.dim() == 1:
        context = _one_hot(model, context, name)
    elif not context.is_floating_point() or context.dim() < 2:
        raise TypeError(
            f"{name}: wanted floats [B, n] or int64 labels [B], "
            f"got {context.dtype} {list(context.shape)}"
        )
    return moved(context, device, dtype)


def _one_hot(model, labels: Tensor, name: str) -> Tensor:
    classes = getattr(model, "n_cfeat", None)
    if classes is None:
        raise TypeError(f"{name}: int labels want a model with .n_cfeat, the number of classes")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{name}: wanted labels from 0 to {classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    return F.one_hot(labels, classes)


def _placed(name: str, leaf, batch: int, device, dtype):
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.shape[:1] != (batch,):
        raise ValueError(f"{name}: wanted {batch} rows (the batch), got {list(leaf.shape)}")
    return moved(leaf, device, dtype if leaf.is_floating_point() else leaf.dtype)


def doubled(context, null_context):
    """Both halves of a guided batch, without the context first (Ho & Salimans 2022).

    null_context: of the context's structure, such as an empty prompt's embedding; None is zeros.
    Raises: ValueError where the structures differ, or for tensors of ints without a null_context.
    """
    if null_context is None:
        null_context = pytree.tree_map(_zeros, context)
    if pytree.tree_structure(null_context) != pytree.tree_structure(context):
        raise ValueError("null_context: wanted the context's structure")
    return pytree.tree_map(
        lambda null, leaf: torch.cat([null, leaf]) if isinstance(leaf, Tensor) else leaf,
        null_context,
        context,
    )


def conditional(tree, batch: int):
    """The half with the context of what a guided run hands its model: of tensors [2B, *]."""
    return pytree.tree_map(
        lambda leaf: leaf[batch:] if isinstance(leaf, Tensor) and len(leaf) == 2 * batch else leaf,
        tree,
    )


def _zeros(leaf):
    if isinstance(leaf, Tensor) and not leaf.is_floating_point():
        raise ValueError(f"null_context: wanted one for a context of {leaf.dtype}, got None")
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf
