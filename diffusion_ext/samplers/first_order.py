"""Samplers of one model call a step and no memory: DDPM, DDIM, DDIM backwards, Euler of a flow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..checks import check_choice, check_eta
from . import grids
from .forms import EPS, X0, X, Z
from .grids import Grid, spaced_timesteps
from .rows import PREDICTIONS, table_of
from .schedules import NoiseSchedule, check_schedule
from .step_table import StepTable


def ddpm(
    schedule: NoiseSchedule, clip: float | None = None, prediction: str = "epsilon"
) -> StepTable:
    """Ancestral sampling over all T steps (Ho et al. 2020, algorithm 2), σ_t² = β_t.

    The posterior mean is taken as its weights of x0 and x_t (eq. 7), which for an epsilon model
    without clipping is (x - (1-α_t)/√(1-ᾱ_t) ε)/√α_t; no noise is added at t = 1.

    Args:
        schedule: the noise schedule the model was trained with.
        clip: clip the data prediction to [-clip, clip]; None leaves it.
        prediction: what the model predicts: "epsilon", "v" or "x0".

    Returns: StepTable of T rows. Raises: ValueError for bad clip or prediction, and where
    alpha_bar is 0 and the model predicts epsilon.
    """
    check_schedule(schedule)
    t = np.arange(schedule.timesteps, 0, -1)
    beta, alpha_bar = schedule.beta[t], schedule.alpha_bar[t]
    alpha = 1 - beta
    # ᾱ_{t-1}, as ᾱ_t/α_t so that the weights agree with the formula above at t = 1 of every table.
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha_bar_prev = np.where(alpha > 0, alpha_bar / alpha, schedule.alpha_bar[t - 1])
    posterior_mean = (
        np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * X
        + np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * X0
    )
    next = posterior_mean + np.sqrt(beta) * (t > 1) * Z
    return table_of(grids.between(schedule, t, t - 1), next, clip=clip, prediction=prediction)


def ddim(
    schedule: NoiseSchedule,
    steps: int = 20,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """DDIM on a subsequence of the schedule (Song et al. 2021, eq. 12, σ from eq. 16).

    Args:
        schedule: the noise schedule the model was trained with.
        steps: n, from 1 to T; the last step always lands on index 0, the clean image.
        eta: from 0 (deterministic) to 1 (DDPM's posterior variance).
        spacing: one of `SPACINGS`, see `grids.spaced`.
        clip: clip the data prediction to [-clip, clip], and take ε as what it leaves of x,
            (x - √ᾱ_t x0)/√(1-ᾱ_t); None leaves both as the model has them.
        prediction: what the model predicts: "epsilon", "v" or "x0".

    Returns: StepTable of n rows. Raises: ValueError for an argument out of range, and where
    alpha_bar is 0 and the model predicts epsilon.
    """
    check_schedule(schedule)
    return _ddim(grids.spaced(schedule, steps, spacing), eta, clip, prediction)


def ddim_between(
    schedule: NoiseSchedule,
    t: np.ndarray,
    t_prev: np.ndarray,
    eta: float = 0.0,
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """The rows of DDIM steps from each t to its t_prev (int64 [n] both, 0 <= t_prev < t <= T)."""
    return _ddim(grids.between(schedule, t, t_prev), eta, clip, prediction)


def _ddim(grid: Grid, eta: float, clip: float | None, prediction: str) -> StepTable:
    check_eta(eta)
    # Eq. 16 with ᾱ = signal².
    shrinking = 1 - (grid.signal / grid.next_signal) ** 2
    sigma = eta * grid.next_sigma / grid.sigma * np.sqrt(shrinking)
    direction = np.sqrt(np.maximum(grid.next_sigma**2 - sigma**2, 0))
    next = grid.next_signal * X0 + direction * EPS + sigma * Z
    return table_of(grid, next, clip=clip, prediction=prediction)


def ddim_inversion(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    prediction: str = "epsilon",
) -> StepTable:
    """DDIM backwards: from an image to the noise that `ddim` turns into it (Song et al. 2021, 4.3).

    Each step takes ε and x0 at the level it starts from. The model is given the timestep that the
    step goes to, since it knows none for the clean image. Start with sample(x_T=image).

    Args: as `ddim`; prediction: "epsilon" or "v". Returns: StepTable of n rows, t ascending.
    """
    check_schedule(schedule)
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "x0":
        raise ValueError(
            "prediction: wanted 'epsilon', 'v' or 'flow', which tell the noise of a clean image, "
            "got 'x0'"
        )
    t = spaced_timesteps(schedule.timesteps, steps, spacing)[::-1]
    back = grids.between(schedule, np.append(0, t[:-1]), t)
    grid = replace(back, timesteps=t, times=t / schedule.timesteps)
    next = grid.next_signal * X0 + grid.next_sigma * EPS
    return table_of(grid, next, clip=None, prediction=prediction)


def flow_euler(steps: int = 20, shift: float = 1.0, clip: float | None = None) -> StepTable:
    """Euler's method for rectified flow (Liu et al. 2022; Lipman et al. 2023): x' = x + (t' - t)·v.

    Args:
        steps: n, at least 1. shift: see `grids.flow`.
        clip: clip the data prediction x - t·v to [-clip, clip]; None leaves it.

    Returns: StepTable of n rows for a model of v = ε - x0, given t in (0, 1]. Raises: ValueError.
    """
    return _ddim(grids.flow(steps, shift), 0.0, clip, "flow")
