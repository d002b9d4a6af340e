"""What a model is conditioned on: tensors, alone or in a structure; doubled for guidance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..checks import kind, moved, shown
from ..nn.context_unet import UnetForward
from ..nn.labels import are_labels, no_context, one_hot


def as_context(model, context, shape, device, dtype, name: str = "context"):
    """A context on the sample's device, its floats in the sample's dtype.

    Args:
        context: None; floats [B, ...]; int64 labels [B], which become one-hot of model.n_cfeat; or
            a dict, tuple or list of tensors [B, ...] and whatever else the model takes.
        shape: (B, *) of the samples.

    Raises: TypeError, ValueError for a tensor that is not of B rows.
    """
    if context is None:
        return None
    if isinstance(model, UnetForward):
        model.check_context(context, shape[0], name)
    if not isinstance(context, Tensor):
        leaves = pytree.tree_leaves(context)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError(
                f"{name}: wanted a tensor, a dict, tuple or list with tensors in it, or None, got "
                f"{shown(context)} without one; torch.tensor(...) makes one"
            )
        return pytree.tree_map(lambda leaf: _placed(name, leaf, shape, device, dtype), context)
    _check_rows(name, context, shape)
    if are_labels(context):
        return moved(one_hot(name, context, _classes_of(model, name), dtype), device)
    if not context.is_floating_point() or context.dim() < 2:
        raise TypeError(no_context(name, context, shape[0], "n"))
    return moved(context, device, dtype)


def _classes_of(model, name: str) -> int:
    classes = getattr(model, "n_cfeat", None)
    if classes is None:
        raise TypeError(
            f"{name}: wanted vectors, floats [B, n], got labels, for which {kind(model)} has no "
            "n_cfeat, the number of its classes"
        )
    return classes


def _check_rows(name: str, tensor: Tensor, shape) -> None:
    if tensor.shape[:1] != shape[:1]:
        raise ValueError(
            f"{name}: wanted {shape[0]} rows, the batch of shape {tuple(shape)}, "
            f"got {list(tensor.shape)}"
        )


def _placed(name: str, leaf, shape, device, dtype):
    if not isinstance(leaf, Tensor):
        return leaf
    _check_rows(name, leaf, shape)
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
