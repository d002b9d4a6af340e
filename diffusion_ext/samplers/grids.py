"""The noise levels that a sampler steps through: x = signal·x0 + sigma·ε at each of them.

A level is a timestep of a `NoiseSchedule`, or lies between two: the grids of Karras et al. are even
in a power of sigma/signal, whatever timesteps that falls on. Rectified flow has levels of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from ..checks import check_at_least_1, check_choice, check_int, check_number
from .schedules import MOST_TIMESTEPS, NoiseSchedule, check_schedule

BY_TIMESTEP = ("leading", "trailing", "linspace", "simple")
BETWEEN_TIMESTEPS = ("normal", "sgm_uniform", "beta")
BY_RATIO = ("karras", "exponential", "kl_optimal")
MOST_SHIFT = 1e6
SPACINGS = (*BY_TIMESTEP, *BETWEEN_TIMESTEPS, *BY_RATIO)


@dataclass(frozen=True)
class Level:
    """A noise level.

    Attributes:
        signal, sigma: x = signal·x0 + sigma·ε. time: what the model is given there.
    """

    signal: float
    sigma: float
    time: float

    @property
    def r(self) -> float:
        """sigma/signal: the noise of x/signal, which Karras et al. 2022 call σ."""
        return self.sigma / self.signal if self.signal else math.inf

    @property
    def lam(self) -> float:
        """λ = log(signal/sigma), half the log of the signal-to-noise ratio (Lu et al. 2022)."""
        if not self.sigma:
            return math.inf
        return math.log(self.signal / self.sigma) if self.signal else -math.inf


@dataclass(frozen=True)
class Grid:
    """Steps from level to level, float64 [n] each but for the timesteps.

    Attributes:
        timesteps: int64, the step word of each step's noise; on a schedule, its timestep.
        times: what the model is given, t/T on a schedule.
        signal, sigma: of the level that a step starts from.
        next_signal, next_sigma: of the level that it lands on.
        train_timesteps: T.
        level_at: sigma/signal > 0 -> the level there, between those of the grid.
    """

    timesteps: np.ndarray
    times: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    next_signal: np.ndarray
    next_sigma: np.ndarray
    train_timesteps: int
    level_at: Callable[[float], Level]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def last(self) -> Level:
        """The level that the last step lands on; no model is called there."""
        return Level(float(self.next_signal[-1]), float(self.next_sigma[-1]), 0.0)

    def levels(self) -> list[Level]:
        """The n + 1 of them."""
        rows = zip(self.signal.tolist(), self.sigma.tolist(), self.times.tolist(), strict=True)
        return [*(Level(*row) for row in rows), self.last]

    def steps(self) -> Iterator[tuple[Level, Level]]:
        """Where each step starts, and where it lands."""
        levels = self.levels()
        return itertools.pairwise(levels)

    def rest(self, first: int) -> Grid:
        """The steps from `first` on."""
        arrays = ("timesteps", "times", "signal", "sigma", "next_signal", "next_sigma")
        return replace(self, **{name: getattr(self, name)[first:] for name in arrays})


def between(schedule: NoiseSchedule, t: np.ndarray, t_next: np.ndarray) -> Grid:
    """Steps from timesteps t to t_next (int64 [n] each, 0 is the clean image)."""
    signal, sigma, last = schedule.signal, schedule.sigma, schedule.timesteps
    start, end = (signal[t], sigma[t]), (signal[t_next], sigma[t_next])
    return Grid(t, t / last, *start, *end, last, partial(_of_schedule, schedule))


def spaced(schedule: NoiseSchedule, steps: int, spacing: str) -> Grid:
    """n steps of a schedule from noise to the clean image.

    On timesteps, "trailing", "leading", "linspace" and "simple": see `spaced_timesteps`. Between
    them, where log(sigma/signal) is interpolated: "normal" is even from T to 1, "sgm_uniform" the
    first n of n + 1 such, "beta" has the quantiles of Beta(0.6, 0.6), dense at both ends (Lee et
    al. 2024), which needs scipy. In r = sigma/signal, from its value at T down to that at t = 1 and
    then 0: "karras" is even in r^(1/7) (Karras et al. 2022, eq. 5), "exponential" in log r,
    "kl_optimal" in arctan r (Sabour et al. 2024, theorem 3.1); the model is given the t whose log r
    that is. The names are those of ComfyUI's schedulers and diffusers' options.
    Raises: TypeError for another schedule; ValueError for steps outside 1..T, an unknown spacing,
    or a grid between timesteps where alpha_bar[T] is 0.
    """
    check_schedule(schedule)
    check_choice("spacing", spacing, SPACINGS)
    if spacing in BY_TIMESTEP:
        t = spaced_timesteps(schedule.timesteps, steps, spacing)
        return between(schedule, t, np.append(t[1:], 0))
    last = _check_steps(schedule.timesteps, steps)
    if schedule.signal[last] == 0:
        raise ValueError(
            f"spacing: {spacing!r} is a grid in sigma/signal, which is infinite at T, where "
            "alpha_bar is 0 (zero terminal SNR); wanted 'trailing'"
        )
    known = np.log(schedule.sigma[1:] / schedule.signal[1:])
    if spacing in BETWEEN_TIMESTEPS:
        t = _real_timesteps(last, steps, spacing)
        r = np.exp(np.interp(t, np.arange(1, last + 1), known))
        return _of_ratios(schedule, np.append(r, 0), t / last)
    r = _ratios(*np.exp(known[[-1, 0]]), steps, spacing)
    return _of_ratios(schedule, np.append(r, 0), _times_of(schedule, r))


def of_sigmas(sigmas: np.ndarray) -> Grid:
    """Steps between noise levels x0 + sigma·ε, whose signal is 1 and whose time is sigma, as Karras
    et al. 2022 and k-diffusion have them.

    Args: sigmas: float64 [n+1], of which the last may be 0.
    """
    n, ones = len(sigmas) - 1, np.ones(len(sigmas) - 1)
    start, end = (ones, sigmas[:-1]), (ones, sigmas[1:])
    return Grid(np.arange(n, 0, -1), sigmas[:-1], *start, *end, n, _of_sigma)


def _of_schedule(schedule: NoiseSchedule, r: float) -> Level:
    """Between timesteps log r interpolates them."""
    signal = 1 / math.sqrt(1 + r * r)
    return Level(signal, r * signal, float(_times_of(schedule, np.array(r))))


def _of_flow(r: float) -> Level:
    """signal + sigma = 1."""
    return Level(1 / (1 + r), r / (1 + r), r / (1 + r))


def _of_sigma(r: float) -> Level:
    return Level(1.0, r, r)


def _real_timesteps(last: int, steps: int, spacing: str) -> np.ndarray:
    if spacing == "normal":
        return np.linspace(last, 1, steps)
    if spacing == "sgm_uniform":
        return np.linspace(last, 1, steps + 1)[:-1]
    try:
        from scipy.stats import beta
    except ImportError as error:
        raise ImportError("spacing: 'beta' needs scipy: pip install scipy") from error
    return 1 + beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * (last - 1)


def _ratios(high: float, low: float, steps: int, spacing: str) -> np.ndarray:
    even = np.linspace(0, 1, steps)
    into, back = {
        "karras": (lambda r: r ** (1 / 7), lambda u: u**7),
        "exponential": (np.log, np.exp),
        "kl_optimal": (np.arctan, np.tan),
    }[spacing]
    return back(into(high) + even * (into(low) - into(high)))


def _times_of(schedule: NoiseSchedule, r: np.ndarray) -> np.ndarray:
    """t/T, between timesteps, of ratios r = sigma/signal above 0."""
    known = np.log(schedule.sigma[1:] / schedule.signal[1:])
    last = schedule.timesteps
    return np.interp(np.log(r), known, np.arange(1, last + 1)) / last


def _of_ratios(schedule: NoiseSchedule, r: np.ndarray, times: np.ndarray) -> Grid:
    """The grid of levels with sigma/signal = r, float64 [n+1], and signal² + sigma² = 1."""
    signal = 1 / np.sqrt(1 + r**2)
    sigma, counters = r * signal, np.arange(len(times), 0, -1)
    start, end = (signal[:-1], sigma[:-1]), (signal[1:], sigma[1:])
    return Grid(counters, times, *start, *end, schedule.timesteps, partial(_of_schedule, schedule))


def flow(steps: int, shift: float = 1.0) -> Grid:
    """n even steps of rectified flow, t from 1 to 0, signal 1 - t and sigma t (Liu et al. 2022).

    shift: s·t/(1 + (s-1)·t) in place of t, more steps at high noise (Esser et al. 2024, eq. 23).
    Raises: TypeError, ValueError for steps below 1 or shift not above 0.
    """
    check_at_least_1("steps", steps)
    if steps > MOST_TIMESTEPS:
        raise ValueError(f"steps: wanted at most {MOST_TIMESTEPS}, got {steps}")
    check_number("shift", shift)
    if shift <= 0:
        raise ValueError(f"shift: wanted a number above 0, got {shift}")
    if not 1 / MOST_SHIFT <= shift <= MOST_SHIFT:
        raise ValueError(f"shift: wanted from {1 / MOST_SHIFT:g} to {MOST_SHIFT:g}, got {shift}")
    t = 1 - np.arange(steps + 1) / steps
    t = shift * t / (1 + (shift - 1) * t)
    counters = np.arange(steps, 0, -1)
    return Grid(counters, t[:-1], 1 - t[:-1], t[:-1], 1 - t[1:], t[1:], steps, _of_flow)


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> np.ndarray:
    """n of the timesteps 1..T, descending (Lin et al. 2023, table 2).

    "trailing" starts at T and strides T/n; "leading" strides T//n and ends at 1; "linspace" spreads
    evenly from T to 1; "simple" is "trailing" with T·i/n cut to integers. Where n divides T,
    both are T, T - T/n, ..., T/n.

    Returns: int64 [n]. Raises: ValueError for steps outside 1..T or an unknown spacing.
    """
    _check_steps(timesteps, steps)
    check_choice("spacing", spacing, BY_TIMESTEP)
    i = np.arange(steps)
    if spacing == "trailing":
        grid = timesteps - i * timesteps / steps
    elif spacing == "leading":
        grid = 1 + (steps - 1 - i) * (timesteps // steps)
    elif spacing == "linspace":
        grid = np.linspace(timesteps, 1, steps)
    else:
        grid = timesteps - i * timesteps // steps
    return np.round(grid).astype(np.int64)


def _check_steps(timesteps: int, steps) -> int:
    check_int("steps", steps)
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps: wanted from 1 to {timesteps} (the schedule's T), got {steps}")
    return timesteps
