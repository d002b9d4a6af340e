"""One step of a loop that is kept: ddpm_step and ddim_step from timestep to timestep, sampler_step
by a row of any sampler's table."""

from __future__ import annotations

import functools
from typing import overload

import numpy as np
import torch
from torch import Tensor

from ..checks import (
    as_timestep,
    check_bool,
    check_eta,
    check_number,
    check_sample,
    hides_its_values,
    kind,
    shown,
)
from ..ops import sampler_step as step_of_tensors
from ..ops.sampler_step import COLUMNS, apply_row
from ..ops.wide import wide_device
from .first_order import ddim_between, ddpm
from .noise import resolve_noise
from .schedules import NoiseSchedule, check_schedule
from .step_table import StepTable, check_table


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
        t: from 1 to T, an int of Python's or numpy's, or integers [] or [B]. A tensor on a GPU is
            used there, without waiting for it.
        noise: z [B, *] or a torch.Generator; seeds: int64 [B] or an int, for z made in the kernel.
            With neither, seeds are drawn from torch's default generator. None is needed at t = 1.

    Returns: the sample at t-1, [B, *]. Raises: TypeError, ValueError.
    """
    check_sample("x", x)
    check_schedule(schedule)
    t = as_timestep("t", t, x, 1, schedule.timesteps)
    table = schedule.constant(_ddpm_tensors, x.device, x.dtype)
    if isinstance(t, Tensor):
        row, needs_noise = schedule.timesteps - t, True
    else:
        row, needs_noise = _row(schedule.timesteps - t, x), t > 1
    return _step(x, model_output, table, row, noise, seeds, needs_noise)[0]


def ddim_step(
    x: Tensor,
    model_output: Tensor,
    t: int | Tensor,
    t_prev: int | Tensor,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
) -> Tensor:
    """One DDIM step with an epsilon model, t to t_prev (Song et al. 2021, eq. 12 and 16).

    Args:
        x: [B, *], the sample at t. model_output: [B, *], the predicted noise, in x's dtype.
        t, t_prev: 0 <= t_prev < t <= T, each as for `ddpm_step`.
        eta: from 0 (deterministic, no noise) to 1. noise, seeds: as for `ddpm_step`.

    Returns: the sample at t_prev, [B, *]. Raises: TypeError, ValueError.
    """
    check_sample("x", x)
    check_schedule(schedule)
    t = as_timestep("t", t, x, 1, schedule.timesteps)
    t_prev = as_timestep("t_prev", t_prev, x, 0, schedule.timesteps - 1)
    check_eta(eta)
    if isinstance(t, Tensor) or isinstance(t_prev, Tensor):
        table, row, needs_noise = _ddim_rows(x, t, t_prev, schedule, eta)
    else:
        if t_prev >= t:
            raise ValueError(f"t_prev: wanted from 0 to {t - 1}, got {t_prev}")
        numbers = _constant(t), _constant(t_prev), _constant(eta)
        table = schedule.constant(_ddim_tensors, *numbers, x.device, x.dtype)
        row, needs_noise = _row(0, x), eta > 0 and t_prev > 0
    return _step(x, model_output, table, row, noise, seeds, needs_noise)[0]


@overload
def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: StepTable,
    row: int | Tensor,
    /,
    *,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
    guidance: float = 1.0,
    return_x0: bool = False,
    slots: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
@overload
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
) -> Tensor | tuple[Tensor, Tensor]: ...
def sampler_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: StepTable | Tensor,
    timesteps: int | Tensor | None = None,
    row: int | Tensor | None = None,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
    history: Tensor | None = None,
    clip: float | None = None,
    guidance: float = 1.0,
    return_x0: bool = False,
    slots: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step by a row of a sampler's table: sampler_step(x, model_output, table, row).

        m  = m_uncond + guidance·(m_cond - m_uncond)      where model_output is [2B, *]
        x0 = clip(kx·x + km·m)
        x' = ax·x + am·m + a0·x0 + a_1·s_1 + ... + a_S·s_S + az·z

    and up to two slots s_j take such a combination (b in place of a), of the terms as they were.

    Args:
        x: [B, *], the sample; model_output: [B, *], or [2B, *] (unconditional half first), in x's
            dtype.
        table: a StepTable. row: of the table, an int, or int64 [] or [B] (one per sample) on x's
            device.
        noise: z [B, *] or a torch.Generator; seeds: int64 [B] or an int, for z made in the kernel
            (stream 1, step = the row's timestep). With neither, seeds are drawn from torch's
            default generator. A row without noise uses none of them.
        guidance: the scale of classifier-free guidance, where the rows have none of their own.
        slots: [S, B, *], what the table remembers: table.new_slots(x) of the run's first x;
            updated in place. None for a table without slots.

    A graph may want the table as tensors, whose numbers can change:
    sampler_step(x, model_output, coefficients, timesteps, row). All else is then as it is given:

        coefficients: float32 [n, columns] (float64 for a float64 x). timesteps: int64 [n]. Both are
            table.tensors(device, dtype). row: int64 [] or [B].
        noise: z [B, *]; seeds: int64 [B]; with neither, z is 0.
        history: [B, *], what s_1 is in a table of one slot; it is read only.
        clip: x0 is clipped to [-clip, clip]; None for no clipping.

    Returns: x' [B, *], or (x', x0) with return_x0. Raises: TypeError, ValueError.
    """
    if isinstance(coefficients, Tensor):
        return step_of_tensors(
            x, model_output, coefficients, timesteps, row,
            noise, seeds, history, clip, guidance, return_x0, slots,
        )  # fmt: skip
    check_table(coefficients)
    if history is not None or clip is not None:
        raise ValueError(
            "history, clip: wanted None with a StepTable, which has its slots and clip"
        )
    if timesteps is not None and row is not None:
        raise ValueError("timesteps, row: wanted the row alone with a StepTable, got both")
    table, row = coefficients, timesteps if row is None else row
    check_sample("x", x)
    check_number("guidance", guidance)
    check_bool("return_x0", return_x0)
    if guidance != 1 and table.guidance is not None:
        raise ValueError(f"guidance: wanted 1 with a table that has its own, got {guidance}")
    _check_slots(table, slots)
    coefficients, timesteps, rows, noisy = table.steps_of(x)
    if isinstance(row, Tensor):
        needs_noise = any(noisy)
    else:
        _check_row(row, table)
        row, needs_noise = rows[row], noisy[row]
    table, options = (coefficients, timesteps), (table.clip, guidance, return_x0)
    out, x0 = _step(x, model_output, table, row, noise, seeds, needs_noise, options, slots)
    return (out, x0) if return_x0 else out


def _check_slots(table: StepTable, slots) -> None:
    if slots is None and not table.slots:
        return
    if not isinstance(slots, Tensor) or slots.dim() == 0 or len(slots) != table.slots:
        wanted = "None with a table that has none"
        if table.slots:
            wanted = f"table.new_slots(x), [{table.slots}, *x.shape], made before the first step"
        raise ValueError(f"slots: wanted {wanted}, got {shown(slots)}")


def _check_row(row, table: StepTable) -> None:
    if isinstance(row, bool) or not isinstance(row, (int, np.integer)):
        raise TypeError(f"row: wanted an int, or an int64 tensor, got {kind(row)}")
    if not 0 <= row < len(table):
        raise ValueError(f"row: wanted from 0 to {len(table) - 1}, got {row}")


def _ddim_rows(x, t, t_prev, schedule, eta):
    """(table, row, needs_noise) of timesteps that are tensors, one for all samples or for each."""
    t, t_prev = (i if isinstance(i, Tensor) else _row(i, x) for i in (t, t_prev))
    t, t_prev = t.reshape(-1), t_prev.reshape(-1)
    t, t_prev = (i.to(wide_device(i.device)) for i in torch.broadcast_tensors(t, t_prev))
    if not len(t):  # of no sample: any step
        table = ddim_between(schedule, np.array([1]), np.array([0]), eta)
        return table.tensors(x.device, x.dtype), t.to(x.device), False
    row = _row(0, x) if len(t) == 1 else torch.arange(len(t), device=x.device)
    if t.device.type != "cpu" or hides_its_values(t) or hides_its_values(t_prev):
        rows = _ddim_rows_unread(t, t_prev, schedule, eta)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (rows.to(x.device, wide), t.to(x.device)), row, eta > 0
    if (t_prev >= t).any():
        wrong = int((t_prev >= t).nonzero()[0])
        raise ValueError(
            f"t_prev: wanted values below t's, got {t_prev[wrong]} for t = {t[wrong]} "
            f"(sample {wrong})"
        )
    table = ddim_between(schedule, t.numpy(), t_prev.numpy(), eta)
    return table.tensors(x.device, x.dtype), row, eta > 0


def _ddim_rows_unread(t, t_prev, schedule, eta) -> Tensor:
    """What `ddim_between` computes, float64 [n, 7], on the device of t and t_prev, int64 [n]."""
    signal, sigma = schedule.constant(_levels, t.device)
    below = torch.where(t_prev < t, t_prev, len(signal))  # else out of range, which torch refuses
    s, s_prev, sigma_prev = signal[t], signal[below], sigma[below]
    z = eta * sigma_prev / sigma[t] * torch.sqrt(1 - (s / s_prev) ** 2)
    ax = s_prev / s
    am = torch.sqrt((sigma_prev**2 - z**2).clamp(min=0)) - ax * sigma[t]
    columns = {"kx": 1 / s, "km": -sigma[t] / s, "ax": ax, "am": am, "az": z}
    zero = torch.zeros_like(ax)
    return torch.stack([columns.get(name, zero) for name in COLUMNS], dim=1)


def _step(
    x, model_output, table, row, noise, seeds, needs_noise, options=(None, 1.0, False), slots=None
):
    """(x', x0) of a step by a table (coefficients, timesteps) of our own and a row of it.

    The table is not asked for requires_grad, which torch.compile cannot read off a constant.
    """
    if needs_noise:
        noise, seeds = resolve_noise(x, noise, seeds)
    else:
        noise = seeds = None
    tensors = (x, model_output, *table, row, noise, seeds, slots)
    differentiable = (x, model_output, noise, slots)
    return apply_row(tensors, options, differentiable, has_slots=slots is not None)


def _row(number: int, x: Tensor) -> Tensor:
    """[], filled on the device: a tensor of a host's number would be copied, and waited for."""
    return torch.full((), number, dtype=torch.int64, device=x.device)


def _constant(number):
    """number, which torch.compile makes a symbol where it changes; hashing it gives its value."""
    (value,) = {number}
    return value


def _ddpm_tensors(schedule, device, dtype) -> tuple[Tensor, Tensor]:
    return _ddpm_table(schedule).tensors(device, dtype)


def _ddim_tensors(schedule, t, t_prev, eta, device, dtype) -> tuple[Tensor, Tensor]:
    return _ddim_table(schedule, t, t_prev, eta).tensors(device, dtype)


def _levels(schedule, device) -> tuple[Tensor, Tensor]:
    return tuple(schedule.tensor(name, device, torch.float64) for name in ("signal", "sigma"))


@functools.lru_cache(maxsize=16)
def _ddpm_table(schedule: NoiseSchedule) -> StepTable:
    return ddpm(schedule)


@functools.lru_cache(maxsize=4096)  # a run revisits its (t, t_prev) pairs
def _ddim_table(schedule, t: int, t_prev: int, eta: float) -> StepTable:
    return ddim_between(schedule, np.array([t]), np.array([t_prev]), eta)
