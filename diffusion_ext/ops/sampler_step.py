"""sampler_step: one row of a sampler's table applied to a batch, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
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
from .backend import kernels, needs_grad, register_fake, serves

# The weights of a row, in the order in which the kernels read them.
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
):
    """Apply a row of a `StepTable`: x' and, where asked, the data prediction x0.

        m  = m_uncond + guidance·(m_cond - m_uncond)      where model_output is [2B, *]
        x0 = clip(kx·x + km·m)
        x' = ax·x + am·m + a0·x0 + ah·history + az·z

    Args:
        x: [B, *], the sample; model_output: [B, *], or [2B, *] (unconditional half first), in x's
            dtype. history: [B, *] or None, the data prediction of the step before.
        coefficients: float32 [n, 7] (float64 for a float64 x); timesteps: int64 [n].
        row: int64, [] or [B] (one per sample).
        noise: z [B, *], or seeds: int64 [B] for z made in the kernel (stream 1, step = the row's
            timestep); with neither, z is 0. No noise is made where az is 0.
        clip: x0 is clipped to [-clip, clip]. guidance: the scale of classifier-free guidance.

    Returns: x' [B, *], or (x', x0) with return_x0. Raises: TypeError, ValueError.
    """
    check_clip(clip)
    check_number("guidance", guidance)
    tensors = (x, model_output, coefficients, timesteps, row, noise, seeds, history)
    differentiable = (x, model_output, coefficients, noise, history)
    out, x0 = apply_row(tensors, (clip, guidance, return_x0), differentiable)
    return (out, x0) if return_x0 else out


# What a kernel's own checks raise, and what our look at arguments that are no tensors does.
_REFUSALS = (RuntimeError, TypeError, AttributeError)


def apply_row(tensors: tuple, options: tuple, differentiable: tuple):
    """(x', x0) of the op's arguments, its tensors and its options; which may ask for gradients.

    A kernel checks its arguments before it runs, so ours, which took as long as a small step, are
    made only where it refuses, to say which argument was wrong; and before the reference.
    """
    if torch.compiler.is_compiling():  # the op is then a fake, which checks nothing
        _check(*tensors)
    try:
        # Nor does it with a tensor on "meta", for which the fake would be called as well.
        refused = _any_meta(*tensors)
        if not refused and serves(tensors[0]) and not needs_grad(*differentiable):
            return kernels().sampler_step(*tensors, *options)
    except _REFUSALS:
        _check(*tensors)
        raise
    _check(*tensors)
    return reference.sampler_step(*tensors, *options[:-1])


def _any_meta(*tensors) -> bool:
    for tensor in tensors:  # noqa: SIM110 (any of a generator takes twice as long)
        if tensor is not None and tensor.is_meta:
            return True
    return False


def _check(x, model_output, coefficients, timesteps, row, noise, seeds, history) -> None:
    _check_samples(x, model_output, noise, seeds, history)
    _check_table(x, coefficients, timesteps, row)


def _check_samples(x, model_output, noise, seeds, history) -> None:
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
    for name, tensor in (("noise", noise), ("history", history)):
        if tensor is not None:
            check_like(name, tensor, "x", x)
    if seeds is not None:
        check_indices("seeds", seeds, batch, x.device)


def _check_table(x, coefficients, timesteps, row) -> None:
    check_floating("coefficients", coefficients)
    if coefficients.dim() != 2 or coefficients.shape[1] != len(COLUMNS):
        raise ValueError(f"coefficients: wanted shape [n, 7], got {list(coefficients.shape)}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if coefficients.dtype != wanted:
        raise TypeError(f"coefficients: wanted dtype {wanted}, got {coefficients.dtype}")
    check_device("coefficients", coefficients, x.device)
    check_indices("timesteps", timesteps, coefficients.shape[0], x.device)
    check_int64("row", row, x.device)
    if row.dim() and row.shape != x.shape[:1]:
        raise ValueError(f"row: wanted shape [] or [{len(x)}], got {list(row.shape)}")
    check_in_range("row", row, 0, coefficients.shape[0] - 1)


@register_fake("sampler_step")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance, r):
    return torch.empty_like(x), torch.empty_like(x) if r else x.new_empty(0)


@register_fake("sampler_step_")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance):
    return None
