"""ddpm_step and ddim_step: one step of a loop that is kept, from timestep to timestep."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ..checks import as_timestep, check_eta, check_sample, hides_its_values
from ..ops.sampler_step import COLUMNS, apply_row
from .first_order import ddim_between, ddpm
from .noise import resolve_noise
from .schedules import NoiseSchedule, check_schedule
from .step_table import StepTable


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
    return _step(x, model_output, table, row, noise, seeds, needs_noise)


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
    return _step(x, model_output, table, row, noise, seeds, needs_noise)


def _ddim_rows(x, t, t_prev, schedule, eta):
    """(table, row, needs_noise) of timesteps that are tensors, one for all samples or for each."""
    t, t_prev = (i if isinstance(i, Tensor) else _row(i, x) for i in (t, t_prev))
    t, t_prev = t.reshape(-1), t_prev.reshape(-1)
    t, t_prev = torch.broadcast_tensors(t, t_prev)
    if not len(t):  # of no sample: any step
        table = ddim_between(schedule, np.array([1]), np.array([0]), eta)
        return table.tensors(x.device, x.dtype), t, False
    row = _row(0, x) if len(t) == 1 else torch.arange(len(t), device=x.device)
    if t.device.type != "cpu" or hides_its_values(t) or hides_its_values(t_prev):
        rows = _ddim_rows_unread(t, t_prev, schedule, eta)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (rows.to(wide), t), row, eta > 0
    if (t_prev >= t).any():
        raise ValueError(f"t_prev: wanted values below t's {t.tolist()}, got {t_prev.tolist()}")
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


def _step(x, model_output, table, row, noise, seeds, needs_noise) -> Tensor:
    """A step by a table (coefficients, timesteps) of our own and a row of it: x'.

    The table is not asked for requires_grad, which torch.compile cannot read off a constant.
    """
    if needs_noise:
        noise, seeds = resolve_noise(x, noise, seeds)
    else:
        noise = seeds = None
    tensors = (x, model_output, *table, row, noise, seeds, None)
    return apply_row(tensors, (None, 1.0, False), (x, model_output, noise))[0]


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
