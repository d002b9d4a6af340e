"""Samplers of models that are distilled to a few steps: LCM and TCD."""

from __future__ import annotations

import numpy as np

from ..checks import check_eta, check_int
from . import grids
from .forms import EPS, X0, X, Z
from .rows import table_of
from .schedules import NoiseSchedule, check_schedule
from .step_table import StepTable

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # of the boundary condition that LCMs are trained with


def lcm(
    schedule: NoiseSchedule,
    steps: int = 4,
    original_steps: int = 50,
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """Sampling of a latent consistency model (Luo et al. 2023): each step predicts the
    image, c_skip·x + c_out·x0, and noises it to the next level; the last one keeps it.

    Args:
        schedule, clip, prediction: as `ddim`.
        steps: n, at most original_steps, of the steps that the model was distilled on: those at
            multiples of T//original_steps, every original_steps/n-th of them.

    Returns and raises as `ddim`.
    """
    t = _distilled_timesteps(schedule, steps, original_steps)
    grid = grids.between(schedule, t, np.append(t[1:], 0))
    scaled = (t - 1) * TIMESTEP_SCALING  # the authors count timesteps from 0
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
    image = c_skip * X + c_out * X0
    next = grid.next_signal * image + grid.next_sigma * Z
    return table_of(grid, next, clip=clip, prediction=prediction)


def tcd(
    schedule: NoiseSchedule,
    steps: int = 4,
    original_steps: int = 50,
    eta: float = 0.3,
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """Strategic stochastic sampling of a trajectory consistency model (Zheng et al. 2024): from t
    to s = (1 - eta)·t' without noise, and noise from s up to t'. The last step lands on the
    schedule's first level, as the authors' code does; that is the image, and its level is the clean
    one: what a mask keeps is kept without noise.

    Args: as `lcm`; eta: γ, from 0 (no noise) to 1. Returns and raises as `ddim`.
    """
    check_eta(eta)
    t = _distilled_timesteps(schedule, steps, original_steps)
    grid = grids.between(schedule, t, np.append(t[1:], 0))
    t_next = np.append(t[1:], 1)
    s = np.floor((1 - eta) * (t_next - 1)).astype(np.int64) + 1  # the authors count from 0
    signal, sigma = schedule.signal[s], schedule.sigma[s]
    shrunk = schedule.signal[t_next] / signal
    noise = np.sqrt(1 - shrunk**2) * (np.arange(steps) < steps - 1)
    next = shrunk * (signal * X0 + sigma * EPS) + noise * Z
    return table_of(grid, next, clip=clip, prediction=prediction)


def _distilled_timesteps(schedule, steps, original_steps) -> np.ndarray:
    """n of the multiples of T//original_steps, descending: int64 [n]."""
    check_schedule(schedule)
    for name, value in (("steps", steps), ("original_steps", original_steps)):
        check_int(name, value)
    if not 1 <= original_steps <= schedule.timesteps:
        raise ValueError(
            f"original_steps: wanted from 1 to {schedule.timesteps} (T), got {original_steps}"
        )
    if not 1 <= steps <= original_steps:
        raise ValueError(f"steps: wanted from 1 to {original_steps} (original_steps), got {steps}")
    every = np.arange(original_steps, 0, -1) * (schedule.timesteps // original_steps)
    return every[np.linspace(0, original_steps, steps, endpoint=False).astype(np.int64)]
