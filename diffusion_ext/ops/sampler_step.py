"""sampler_step: one row of a sampler's table applied to a batch, in one pass."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from .. import samplers
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
    check_schedule,
)
from ..schedules import NoiseSchedule
from . import reference
from .backend import kernels, needs_grad, register_fake, serves
from .noise import resolve_noise


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
    out, x0 = _apply(tensors, (clip, guidance, return_x0), differentiable)
    return (out, x0) if return_x0 else out


# What a kernel's own checks raise, and what our look at arguments that are no tensors does.
_REFUSALS = (RuntimeError, TypeError, AttributeError)


def _apply(tensors: tuple, options: tuple, differentiable: tuple):
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
    if coefficients.dim() != 2 or coefficients.shape[1] != len(samplers.COLUMNS):
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


def ddpm_step(
    x: Tensor,
    model_output: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
) -> Tensor:
    """One step of ancestral sampling with an epsilon model, t to t-1 (Ho et al. 2020, alg. 2).

    Args:
        x: [B, *], the sample at t. model_output: [B, *], the predicted noise, in x's dtype.
        t: an int from 1 to T, or int64 [] or [B] on x's device.
        noise: z [B, *] or a torch.Generator; seeds: int64 [B] or an int, for z made in the kernel.
            With neither, seeds are drawn from torch's default generator. None is needed at t = 1.

    Returns: the sample at t-1, [B, *]. Raises: TypeError, ValueError.
    """
    check_sample("x", x)
    check_schedule(schedule)
    table = schedule.constant(_ddpm_tensors, x.device, x.dtype)
    if isinstance(t, Tensor):
        check_int64("t", t, x.device)
        if t.dim() and t.shape != x.shape[:1]:
            raise ValueError(f"t: wanted shape [] or [{len(x)}], got {list(t.shape)}")
        check_in_range("t", t, 1, schedule.timesteps)
        row, needs_noise = schedule.timesteps - t, True
    else:
        _check_timestep("t", t, 1, schedule.timesteps)
        # Filled on the device: a tensor of a host's number would be copied, and waited for.
        row = torch.full((), schedule.timesteps - int(t), dtype=torch.int64, device=x.device)
        needs_noise = t > 1
    return _step(x, model_output, table, row, noise, seeds, needs_noise)


def ddim_step(
    x: Tensor,
    model_output: Tensor,
    t: int,
    t_prev: int,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
) -> Tensor:
    """One DDIM step with an epsilon model, t to t_prev (Song et al. 2021, eq. 12 and 16).

    Args:
        x: [B, *], the sample at t. model_output: [B, *], the predicted noise, in x's dtype.
        t, t_prev: ints, 0 <= t_prev < t <= T.
        eta: from 0 (deterministic, no noise) to 1. noise, seeds: as for `ddpm_step`.

    Returns: the sample at t_prev, [B, *]. Raises: TypeError, ValueError.
    """
    check_sample("x", x)
    check_schedule(schedule)
    _check_timestep("t", t, 1, schedule.timesteps)
    _check_timestep("t_prev", t_prev, 0, t - 1)
    check_number("eta", eta)
    numbers = _constant(t), _constant(t_prev), _constant(eta)
    table = schedule.constant(_ddim_tensors, *numbers, x.device, x.dtype)
    row = torch.zeros((), dtype=torch.int64, device=x.device)
    return _step(x, model_output, table, row, noise, seeds, eta > 0 and t_prev > 0)


def _step(x, model_output, table, row, noise, seeds, needs_noise) -> Tensor:
    """A step by a table (coefficients, timesteps) of our own and a row of it: x'.

    The table is not asked for requires_grad, which torch.compile cannot read off a constant.
    """
    if needs_noise:
        noise, seeds = resolve_noise(x, noise, seeds)
    else:
        noise = seeds = None
    tensors = (x, model_output, *table, row, noise, seeds, None)
    return _apply(tensors, (None, 1.0, False), (x, model_output, noise))[0]


def _check_timestep(name: str, t, low: int, high: int) -> None:
    if isinstance(t, bool) or not isinstance(t, (int, np.integer)):
        raise TypeError(f"{name}: wanted an int, got {type(t).__name__}")
    if not low <= t <= high:
        raise ValueError(f"{name}: wanted from {low} to {high}, got {t}")


def _constant(number):
    """number, which torch.compile makes a symbol where it changes; hashing it gives its value."""
    (value,) = {number}
    return value


def _ddpm_tensors(schedule, device, dtype) -> tuple[Tensor, Tensor]:
    return _ddpm_table(schedule).tensors(device, dtype)


def _ddim_tensors(schedule, t, t_prev, eta, device, dtype) -> tuple[Tensor, Tensor]:
    return _ddim_table(schedule, t, t_prev, eta).tensors(device, dtype)


@functools.lru_cache(maxsize=16)
def _ddpm_table(schedule: NoiseSchedule) -> samplers.StepTable:
    return samplers.ddpm(schedule)


@functools.lru_cache(maxsize=4096)  # a run revisits its (t, t_prev) pairs
def _ddim_table(schedule, t: int, t_prev: int, eta: float) -> samplers.StepTable:
    return samplers.ddim_between(schedule, np.array([t]), np.array([t_prev]), eta)


@register_fake("sampler_step")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance, r):
    return torch.empty_like(x), torch.empty_like(x) if r else x.new_empty(0)


@register_fake("sampler_step_")
def _(x, model_output, coefficients, timesteps, row, noise, seeds, history, clip, guidance):
    return None
