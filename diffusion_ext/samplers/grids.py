"""The noise levels that a sampler steps through: x = signal·x0 + sigma·ε at each of them.

A level is a timestep of a `NoiseSchedule`, or lies between two: the grids of Karras et al. are even
in a power of sigma/signal, whatever timesteps that falls on. Rectified flow has levels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..checks import check_number
from .schedules import NoiseSchedule

SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential")


@dataclass(frozen=True)
class Grid:
    """Steps from level to level, float64 [n] each but for the timesteps.

    Attributes:
        timesteps: int64, the step word of each step's noise; on a schedule, its timestep.
        times: what the model is given, t/T on a schedule.
        signal, sigma: of the level that a step starts from.
        next_signal, next_sigma: of the level that it lands on.
        train_timesteps: T.
    """

    timesteps: np.ndarray
    times: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    next_signal: np.ndarray
    next_sigma: np.ndarray
    train_timesteps: int

    def __len__(self) -> int:
        return len(self.timesteps)


def between(schedule: NoiseSchedule, t: np.ndarray, t_next: np.ndarray) -> Grid:
    """Steps from timesteps t to t_next (int64 [n] each, 0 is the clean image)."""
    signal, sigma, last = schedule.signal, schedule.sigma, schedule.timesteps
    return Grid(t, t / last, signal[t], sigma[t], signal[t_next], sigma[t_next], last)


def spaced(schedule: NoiseSchedule, steps: int, spacing: str) -> Grid:
    """n steps of a schedule from noise to the clean image.

    "trailing", "leading", "linspace": see `spaced_timesteps`. In r = sigma/signal, from its value
    at T down to that at t = 1 and then 0, "karras" is even in r^(1/7) (Karras et al. 2022, eq. 5),
    "exponential" in log r; the model is given the t, between timesteps, whose log r that is.
    Raises: ValueError for steps outside 1..T, an unknown spacing, or a grid in r where alpha_bar[T]
    is 0.
    """
    if spacing not in ("karras", "exponential"):
        t = spaced_timesteps(schedule.timesteps, steps, spacing)
        return between(schedule, t, np.append(t[1:], 0))
    last = _check_steps(schedule.timesteps, steps)
    if schedule.signal[last] == 0:
        raise ValueError(
            f"spacing: {spacing!r} is a grid in sigma/signal, which is infinite at T, where "
            "alpha_bar is 0 (zero terminal SNR); wanted 'trailing'"
        )
    known = schedule.sigma[1:] / schedule.signal[1:]
    rho = 7 if spacing == "karras" else None
    even = np.linspace(0, 1, steps)
    high, low = (np.log(known[[-1, 0]]) if rho is None else known[[-1, 0]] ** (1 / rho)).tolist()
    r = high + even * (low - high)
    r = np.exp(r) if rho is None else r**rho
    t = np.interp(np.log(r), np.log(known), np.arange(1, last + 1))
    return _of_ratios(np.append(r, 0), t / last, last)


def _of_ratios(r: np.ndarray, times: np.ndarray, train_timesteps: int) -> Grid:
    """The grid of levels with sigma/signal = r, float64 [n+1], and signal² + sigma² = 1."""
    signal = 1 / np.sqrt(1 + r**2)
    sigma, counters = r * signal, np.arange(len(times), 0, -1)
    return Grid(counters, times, signal[:-1], sigma[:-1], signal[1:], sigma[1:], train_timesteps)


def flow(steps: int, shift: float = 1.0) -> Grid:
    """n even steps of rectified flow, t from 1 to 0, signal 1 - t and sigma t (Liu et al. 2022).

    shift: s·t/(1 + (s-1)·t) in place of t, more steps at high noise (Esser et al. 2024, eq. 23).
    Raises: TypeError, ValueError for steps below 1 or shift not above 0.
    """
    _check_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    check_number("shift", shift)
    if shift <= 0:
        raise ValueError(f"shift: wanted a number above 0, got {shift}")
    t = 1 - np.arange(steps + 1) / steps
    t = shift * t / (1 + (shift - 1) * t)
    counters = np.arange(steps, 0, -1)
    return Grid(counters, t[:-1], 1 - t[:-1], t[:-1], 1 - t[1:], t[1:], steps)


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """n of the timesteps 1..T, descending (Lin et al. 2023, table 2).

    "trailing" starts at T and strides T/n; "leading" strides T//n and ends at 1; "linspace" spreads
    evenly from T to 1. Where n divides T, "trailing" is T, T - T/n, ..., T/n.

    Returns: int64 [n]. Raises: ValueError for steps outside 1..T or an unknown spacing.
    """
    _check_steps(timesteps, steps)
    i = np.arange(steps)
    if spacing == "trailing":
        grid = timesteps - i * timesteps / steps
    elif spacing == "leading":
        grid = 1 + (steps - 1 - i) * (timesteps // steps)
    elif spacing == "linspace":
        grid = np.linspace(timesteps, 1, steps)
    else:
        raise ValueError(f"spacing: wanted one of {SPACINGS}, got {spacing!r}")
    return np.round(grid).astype(np.int64)


def _check_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: wanted an int, got {type(value).__name__}")


def _check_steps(timesteps: int, steps) -> int:
    _check_int("steps", steps)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps: wanted from 1 to {timesteps} (the schedule's T), got {steps}")
    return timesteps
