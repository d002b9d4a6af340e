"""Samplers as tables: a sampler is a pure function from a schedule to one row of numbers per step.

Every step of every sampler here is the same arithmetic (x [B,*] the sample, m the model's output,
z normal noise, h the data prediction of the step before):

    x0 = clip(kx·x + km·m)
    x' = ax·x + am·m + a0·x0 + ah·h + az·z

so adding a sampler is writing the weights of x, x0, ε, h and z in x', from its paper, and nothing
else. The weights are computed in float64; the kernels read them as float32, whatever the sample's
dtype (in half precision the noise of the last steps would vanish).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import grids
from .checks import check_clip, check_eta, check_schedule
from .grids import SPACINGS, Grid, spaced_timesteps
from .schedules import NoiseSchedule
from .step_table import COLUMNS, StepTable

__all__ = [
    "COLUMNS", "PREDICTIONS", "SPACINGS", "StepTable", "ddim", "ddim_inversion", "ddpm", "dpmpp_2m",
    "euler", "euler_ancestral", "flow_euler", "spaced_timesteps",
]  # fmt: skip

PREDICTIONS = ("epsilon", "v", "x0", "flow")


def ddpm(schedule: NoiseSchedule, clip: float | None = None, prediction: str = "epsilon"):
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
    return _table(
        grids.between(schedule, t, t - 1),
        x=np.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar),
        x0=np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar),
        z=np.sqrt(beta) * (t > 1),
        clip=clip,
        prediction=prediction,
    )


def ddim(
    schedule: NoiseSchedule,
    steps: int = 20,
    eta: float = 0.0,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
):
    """DDIM on a subsequence of the schedule (Song et al. 2021, eq. 12, σ from eq. 16).

    Args:
        schedule: the noise schedule the model was trained with.
        steps: n, from 1 to T; the last step always lands on index 0, the clean image.
        eta: from 0 (deterministic) to 1 (DDPM's posterior variance).
        spacing: "trailing", "leading", "linspace", "karras" or "exponential": see `grids.spaced`.
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
    return _table(
        grid,
        x0=grid.next_signal,
        eps=np.sqrt(np.maximum(grid.next_sigma**2 - sigma**2, 0)),
        z=sigma,
        clip=clip,
        prediction=prediction,
    )


def euler(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """Euler's method on the probability flow ODE (Karras et al. 2022, algorithm 1 without the 2nd
    order correction). In r = sigma/signal it is x/signal += (r' - r)·ε: DDIM, on a grid of r.

    Args, returns and raises as `ddim`.
    """
    return ddim(schedule, steps, 0.0, spacing, clip, prediction)


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """Euler down to sqrt(r'² - r_up²), then noise r_up = r'·sqrt(r² - r'²)/r, r = sigma/signal: the
    variance of DDPM's posterior (Song et al. 2021, eq. 16 with eta = 1) on a grid of r.

    Args, returns and raises as `ddim`.
    """
    return ddim(schedule, steps, 1.0, spacing, clip, prediction)


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """DPM-Solver++(2M), second order, one model call a step (Lu et al. 2022, algorithm 2).

    With λ = log(signal/sigma), h = λ' - λ and D = (1 + w)·x0 - w·x0_before, w = h/(2·h_before):
    x' = sigma'/sigma·x + signal'·(1 - e^-h)·D. The first and the last step are of first order.

    Args, returns and raises as `ddim`.
    """
    check_schedule(schedule)
    grid = grids.spaced(schedule, steps, spacing)
    with np.errstate(divide="ignore"):  # lambda is infinite where there is no signal, or no noise
        h = np.log(grid.next_signal / grid.signal) - np.log(grid.next_sigma / grid.sigma)
    w = np.zeros(len(grid))
    w[1:-1] = h[1:-1] / (2 * h[:-2])
    shrunk = grid.next_sigma / grid.sigma
    weight = grid.next_signal - grid.signal * shrunk  # signal' (1 - e^-h)
    return _table(
        grid,
        x=shrunk,
        x0=weight * (1 + w),
        before=-weight * w,
        clip=clip,
        prediction=prediction,
    )


def ddim_inversion(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    prediction: str = "epsilon",
) -> StepTable:
    """DDIM backwards: from an image to the noise that `ddim` makes it of (Song et al. 2021, 4.3).

    Each step takes ε and x0 at the level it starts from, with the model given the timestep that it
    goes to: at the clean image there is none that it was trained on. Start with sample(x_T=image).

    Args: as `ddim`; prediction: "epsilon" or "v". Returns: StepTable of n rows, t ascending.
    """
    check_schedule(schedule)
    if prediction == "x0":
        raise ValueError("prediction: 'x0' says nothing of the noise in a clean image")
    t = spaced_timesteps(schedule.timesteps, steps, spacing)[::-1]
    back = grids.between(schedule, np.append(0, t[:-1]), t)
    grid = replace(back, timesteps=t, times=t / schedule.timesteps)
    levels = {"x0": grid.next_signal, "eps": grid.next_sigma}
    return _table(grid, **levels, clip=None, prediction=prediction)


def flow_euler(steps: int = 20, shift: float = 1.0, clip: float | None = None) -> StepTable:
    """Euler's method for rectified flow (Liu et al. 2022; Lipman et al. 2023): x' = x + (t' - t)·v.

    Args:
        steps: n, at least 1. shift: see `grids.flow`.
        clip: clip the data prediction x - t·v to [-clip, clip]; None leaves it.

    Returns: StepTable of n rows for a model of v = ε - x0, given t in (0, 1]. Raises: ValueError.
    """
    return _ddim(grids.flow(steps, shift), 0.0, clip, "flow")


def _table(grid: Grid, *, x=0.0, x0=0.0, eps=0.0, before=0.0, z=0.0, clip, prediction) -> StepTable:
    """Rows from the weights in x' (float64 [n] each) of x, x0, ε, the x0 before, and z."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: wanted one of {PREDICTIONS}, got {prediction!r}")
    check_clip(clip)
    signal, sigma = grid.signal, grid.sigma
    if prediction == "epsilon" and (signal == 0).any():
        raise ValueError(
            f"prediction: 'epsilon' cannot give x0 at t = {grid.timesteps[signal == 0][0]}, where "
            "alpha_bar is 0 (zero terminal SNR); wanted a model that predicts 'v' or 'x0'"
        )
    kx, km, ex, em = _predictions(signal, sigma, prediction)
    # Where x0 is beyond float32 it is not to be had; finite weights keep 0·x0 from being NaN.
    kx, km = np.clip(kx, -1e30, 1e30), np.clip(km, -1e30, 1e30)
    if clip is None:  # x0 is linear in x and m: fold it, so that the kernel reads two weights
        ax, am, a0 = x + x0 * kx + eps * ex, x0 * km + eps * em, 0.0
    else:  # ε is what the clipped x0 leaves of x, so that the two still make up x
        ax, am, a0 = x + eps / sigma, 0.0, x0 - eps * signal / sigma
    columns = {"kx": kx, "km": km, "ax": ax, "am": am, "a0": a0, "ah": before, "az": z}
    weights = np.stack([np.broadcast_to(columns[n], len(grid)) for n in COLUMNS], axis=1)
    levels = [np.append(signal, grid.next_signal[-1]), np.append(sigma, grid.next_sigma[-1])]
    times, levels = grid.times, np.stack(levels, axis=1)
    return StepTable(grid.timesteps, weights, clip, grid.train_timesteps, times, levels)


def _predictions(signal: np.ndarray, sigma: np.ndarray, prediction: str):
    """(kx, km, ex, em), float64 [n] each: x0 = kx·x + km·m and ε = ex·x + em·m.

    x = signal·x0 + sigma·ε; v = signal·ε - sigma·x0 (Salimans & Ho 2022, appendix D); the velocity
    of rectified flow is ε - x0.
    """
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, zero, one
    if prediction == "v":
        return signal, -sigma, sigma, signal
    if prediction == "flow":
        both = signal + sigma
        return 1 / both, -sigma / both, 1 / both, signal / both
    return zero, one, 1 / sigma, -signal / sigma
