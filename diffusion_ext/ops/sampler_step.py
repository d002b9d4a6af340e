"""sampler_step: one row of a sampler's table applied to a batch, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_clip,
    check_device,
    check_floating,
    check_in_range,
    check_indices,
    check_int64,
    check_like,
    check_number,
    check_same_kind,
    check_sample,
)
from . import reference
from .backend import kernel, kernels, needs_grad, register_fake, serves
from .layouts import empty_sum
from .row_shape import MOST_SLOTS, RowShape

# The columns of a row of no slots, or of one that receives every row's x0.
COLUMNS = ("kx", "km", "ax", "am", "a0", "ah", "az")


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    row: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    history: Tensor | None = None,
    clip: float | None = None,
    guidance: float = 1.0,
    return_x0: bool = False,
    slots: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A step by a row of a table's tensors: the second form of dx.sampler_step
    (samplers/single_steps.py), which says what it does and takes."""
    check_clip(clip)
    check_number("guidance", guidance)
    check_bool("return_x0", return_x0)
    remembered = history if slots is None else slots
    if slots is not None and history is not None:
        raise ValueError("history, slots: wanted one of them, got both")
    tensors = (x, model_output, coefficients, timesteps, row, noise, seeds, remembered)
    differentiable = (x, model_output, coefficients, noise, remembered)
    options = (clip, guidance, return_x0)
    out, x0 = apply_row(tensors, options, differentiable, has_slots=slots is not None)
    return (out, x0) if return_x0 else out


# What a kernel's own checks raise, and what our look at arguments that are no tensors does.
_REFUSALS = (RuntimeError, TypeError, AttributeError)


def apply_row(tensors: tuple, options: tuple, differentiable: tuple, has_slots: bool = False):
    """(x', x0) of the op's arguments, its tensors and its options; which may ask for gradients.
    The last tensor is the history, or slots, which are updated in place.

    A kernel checks its arguments before it runs, so ours, which took as long as a small step, are
    made only where it refuses, to say which argument was wrong; and before the reference.
    """
    if torch.compiler.is_compiling():  # the op is then a fake, which checks nothing
        _check(*tensors, has_slots)
    try:
        # Nor does it with a tensor on "meta", for which the fake would be called as well.
        refused = _any_meta(*tensors)
        if not refused and serves(tensors[0]) and not needs_grad(*differentiable):
            ops = kernels()
            op = ops.sampler_step_with_slots if has_slots else ops.sampler_step
            return op(*tensors, *options)
    except _REFUSALS:
        _check(*tensors, has_slots)
        raise
    _check(*tensors, has_slots)
    if not has_slots:
        return reference.sampler_step(*tensors, *options[:-1])
    out, x0, after = reference.sampler_step_with_slots(*tensors, *options[:-1])
    tensors[-1].copy_(after)
    return out, x0


def step_of_row(
    x: Tensor,
    model_output: Tensor,
    row: Tensor,
    timestep: int,
    noise: Tensor | None,
    seeds: Tensor | None,
    slots: list[Tensor],
    clip: float | None,
    return_x0: bool,
):
    """One row for all samples, its slots read where they are, and what it writes returned.

    Args: as `sampler_step`'s, but for
        row: float32 [columns] (float64 for a float64 x); timestep: of its noise.
        slots: up to six tensors [B, *]; a row of no slots has the columns of one.
    Returns: x', x0 with return_x0, and each of the row's writes [B, *], wherever it says that they
        go. Raises: TypeError, ValueError.
    """
    try:
        if serves(x) and not needs_grad(x, model_output, row, noise, *slots):
            step = kernel("sampler_step_of_row")
            return step(x, model_output, row, timestep, noise, seeds, slots, clip, return_x0)
    except _REFUSALS:
        _check_of_row(x, model_output, row, noise, seeds, slots)
        raise
    _check_of_row(x, model_output, row, noise, seeds, slots)
    here = {"device": x.device, "dtype": torch.int64}
    table = row[None], torch.full((1,), timestep, **here), torch.zeros((), **here)
    following, x0, *written = reference.sampler_step_from_slots(
        x, model_output, *table, noise, seeds, slots, clip, 1.0
    )
    return [following, *([x0] if return_x0 else []), *written]


def _check_of_row(x, model_output, row, noise, seeds, slots) -> None:
    _check_samples(x, model_output, noise, seeds)
    check_like("model_output", model_output, "x", x)
    if len(slots) > MOST_SLOTS:
        raise ValueError(f"slots: wanted at most {MOST_SLOTS}, got {len(slots)}")
    for i, slot in enumerate(slots):
        check_like(f"slots[{i}]", slot, "x", x)
    _check_columns("row", row, x, max(len(slots), 1), dims=1)


def _any_meta(*tensors) -> bool:
    for tensor in tensors:  # noqa: SIM110 (any of a generator takes twice as long)
        if tensor is not None and tensor.is_meta:
            return True
    return False


def _check(
    x, model_output, coefficients, timesteps, row, noise, seeds, remembered, has_slots
) -> None:
    _check_samples(x, model_output, noise, seeds)
    slots = 1
    if has_slots:
        slots = _check_slots(x, remembered)
    elif remembered is not None:
        check_like("history", remembered, "x", x)
    _check_table(x, coefficients, timesteps, row, slots)


def _check_samples(x, model_output, noise, seeds) -> None:
    check_sample("x", x)
    check_sample("model_output", model_output)
    batch = x.shape[0]
    if model_output.shape[1:] != x.shape[1:] or model_output.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"model_output: wanted x's shape {list(x.shape)}, or [2B, *] for guidance, "
            f"got {list(model_output.shape)}"
        )
    check_same_kind("model_output", model_output, "x", x)
    if noise is not None and seeds is not None:
        raise ValueError("noise, seeds: wanted one of them, got both")
    if noise is not None:
        check_like("noise", noise, "x", x)
    if seeds is not None:
        check_indices("seeds", seeds, batch, x.device)


def _check_slots(x, slots) -> int:
    """How many there are."""
    check_floating("slots", slots)
    if slots.shape[1:] != x.shape or not 1 <= slots.shape[0] <= MOST_SLOTS:
        raise ValueError(
            f"slots: wanted shape [S, {', '.join(map(str, x.shape))}], S from 1 to {MOST_SLOTS}, "
            f"got {list(slots.shape)}"
        )
    check_same_kind("slots", slots, "x", x)
    return slots.shape[0]


def _check_columns(name, coefficients, x, slots: int, dims: int) -> None:
    check_floating(name, coefficients)
    if coefficients.dim() != dims or RowShape.of(coefficients.shape[-1], slots) is None:
        wanted = f"[{'n, ' * (dims - 1)}{RowShape(slots).width}]"
        raise ValueError(
            f"{name}: wanted shape {wanted}, of {slots} slots, or of a table that says what they "
            f"receive, got {list(coefficients.shape)}"
        )
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if coefficients.dtype != wanted:
        raise TypeError(f"{name}: wanted dtype {wanted}, got {coefficients.dtype}")
    check_device(name, coefficients, x.device)


def _check_table(x, coefficients, timesteps, row, slots: int) -> None:
    _check_columns("coefficients", coefficients, x, slots, dims=2)
    check_indices("timesteps", timesteps, coefficients.shape[0], x.device)
    check_int64("row", row, x.device)
    if row.dim() and row.shape != x.shape[:1]:
        raise ValueError(f"row: wanted shape [] or [{len(x)}], got {list(row.shape)}")
    check_in_range("row", row, 0, coefficients.shape[0] - 1)


def _stepped(x, return_x0: bool):
    return empty_sum(x), empty_sum(x) if return_x0 else x.new_empty(0)


@register_fake("sampler_step")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance, r):
    return _stepped(x, r)


@register_fake("sampler_step_of_row")
def _(x, model_output, row, timestep, noise, seeds, slots, clip, r):
    writes = RowShape.of(row.shape[0], max(len(slots), 1)).writes
    return [empty_sum(x) for _ in range(1 + r + writes)]


@register_fake("sampler_step_with_slots")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, slots, clip, guidance, r):
    return _stepped(x, r)


@register_fake("sampler_step_")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, slots, clip, guidance):
    return None
