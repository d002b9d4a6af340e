"""Samplers in r = sigma/signal, with noise put in on the way: Karras et al. 2022, and ancestral.

With y = x/signal the probability flow ODE is dy/dr = ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ..checks import check_at_least_0, check_eta, is_infinite
from . import grids
from .forms import EPS, X0, Form, X, Z, carried, held, landed, slot
from .grids import Grid, Level
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable


def euler(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Euler's method on the probability flow ODE (Karras et al. 2022, algorithm 2 without the 2nd
    order correction). In r = sigma/signal it is x/signal += (r' - r)·ε: DDIM, on a grid of r.

    Args:
        schedule, steps, spacing, clip, prediction: as `ddim`.
        s_churn, s_tmin, s_tmax: before a step with s_tmin <= r <= s_tmax noise raises r by
            min(s_churn/n, √2 - 1) of itself. s_noise: scales that noise.

    Returns and raises as `ddim`.
    """
    rule = partial(euler_rule, churn=Churn(steps, s_churn, s_tmin, s_tmax, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def euler_rule(grid: Grid, churn: Churn) -> Iterator[Row]:
    for here, there, lifted in churn.steps(grid):
        yield Row(here, lifted(landed(there)))


def euler_ancestral(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepTable:
    """Euler down to sqrt(r'² - r_up²), then noise r_up = eta·r'·sqrt(r² - r'²)/r, r = sigma/signal:
    for eta = 1 the variance of DDPM's posterior (Song et al. 2021, eq. 16) on a grid of r.

    Args: as `ddim`; s_noise: scales the noise. Returns and raises as `ddim`.
    """
    rule = partial(euler_ancestral_rule, noise=Ancestral(eta, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def euler_ancestral_rule(grid: Grid, noise: Ancestral) -> Iterator[Row]:
    for here, there in grid.steps():
        down, up = noise.step(here, there)
        yield Row(here, landed(down) + up)


def heun(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """Heun's method, second order, two model calls a step but for the last (Karras et al. 2022,
    algorithm 2).

    Args: as `ddim`, and s_churn, s_tmin, s_tmax, s_noise as `euler`. Returns and raises as `ddim`.
    """
    rule = partial(heun_rule, churn=Churn(steps, s_churn, s_tmin, s_tmax, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def heun_rule(grid: Grid, churn: Churn) -> Iterator[Row]:
    for here, there, lifted in churn.steps(grid):
        if there.sigma == 0:
            yield Row(here, landed(there))
            return
        yield Row(here, landed(there), {0: EPS})
        half = (there.sigma - there.signal * here.r) / 2  # signal'·(r' - r)/2
        yield Row(there, lifted(X + half * (EPS - slot(0))), begins=False)


def flow_heun(steps: int = 20, shift: float = 1.0, clip: float | None = None) -> StepTable:
    """Heun's method for rectified flow, of the velocity v = ε - x0 (Liu et al. 2022), second order;
    two model calls a step but for the last.

    Args, returns and raises as `flow_euler`.
    """
    return tabulate(flow_heun_rule, grids.flow(steps, shift), clip, "flow")


def flow_heun_rule(grid: Grid) -> Iterator[Row]:
    for here, there in grid.steps():
        if there.sigma == 0:
            yield Row(here, landed(there))
            return
        yield Row(here, landed(there), {0: EPS - X0})
        yield Row(there, X + (there.sigma - here.sigma) / 2 * (EPS - X0 - slot(0)), begins=False)


def dpm2(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    """DPM-Solver-2 with its midpoint in log r, two model calls a step but for the last (Lu et al.
    2022a, algorithm 1; as in k-diffusion, the midpoint's slope is taken over r).

    Args: as `ddim`, and s_churn, s_tmin, s_tmax, s_noise as `euler`. Returns and raises as `ddim`.
    """
    rule = partial(dpm2_rule, churn=Churn(steps, s_churn, s_tmin, s_tmax, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def dpm2_rule(grid: Grid, churn: Churn) -> Iterator[Row]:
    for here, there, lifted in churn.steps(grid):
        if there.sigma == 0:
            yield Row(here, landed(there))
            return
        middle = grid.level_at(math.sqrt(here.r * there.r))
        yield Row(here, landed(middle), {0: X})
        yield Row(middle, lifted(carried(slot(0), EPS, here, there)), begins=False)


def dpm2_ancestral(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepTable:
    """`dpm2` to a level below the next one, then noise up to that (see `Ancestral`).

    Args: as `ddim`; s_noise: scales the noise. Returns and raises as `ddim`.
    """
    rule = partial(dpm2_ancestral_rule, noise=Ancestral(eta, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def dpm2_ancestral_rule(grid: Grid, noise: Ancestral) -> Iterator[Row]:
    return _by_middle(grid, noise, lambda here, down: carried(slot(0), EPS, here, down))


def dpmpp_2s_ancestral(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepTable:
    """DPM-Solver++(2S) to a level below the next one, then noise up to that; two model calls a step
    but for the last (Lu et al. 2022b, algorithm 1 with its midpoint in λ; see `Ancestral`).

    Args: as `ddim`; s_noise: scales the noise. Returns and raises as `ddim`.
    """
    rule = partial(dpmpp_2s_ancestral_rule, noise=Ancestral(eta, s_noise))
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def dpmpp_2s_ancestral_rule(grid: Grid, noise: Ancestral) -> Iterator[Row]:
    return _by_middle(grid, noise, lambda here, down: held(slot(0), X0, here, down))


def _by_middle(
    grid: Grid, noise: Ancestral, second: Callable[[Level, Level], Form]
) -> Iterator[Row]:
    """Euler to the middle in log r, from there the second half of a step, then noise."""
    for here, there in grid.steps():
        down, up = noise.step(here, there)
        if down.sigma == 0:
            yield Row(here, landed(down) + up)
            continue
        middle = grid.level_at(math.sqrt(here.r * down.r))
        yield Row(here, landed(middle), {0: X})
        yield Row(middle, second(here, down) + up, begins=False)


def dpmpp_sde(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> StepTable:
    """DPM-Solver++ for the SDE, both stages with noise; two model calls a step but for the last
    (Lu et al. 2022b, SDE-DPM-Solver++; the stages as in k-diffusion).

    Args: as `ddim`; s_noise: scales the noise; r: where in λ the middle is, above 0 to 1.
    Returns and raises as `ddim`.
    """
    check_at_least_0("r", r)
    if not 0 < r <= 1:
        raise ValueError(f"r: wanted a number above 0, to 1, got {r}")
    rule = partial(dpmpp_sde_rule, noise=Ancestral(eta, s_noise), r=r)
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def dpmpp_sde_rule(grid: Grid, noise: Ancestral, r: float) -> Iterator[Row]:
    for here, there in grid.steps():
        if there.sigma == 0:
            yield Row(here, landed(there))
            return
        middle = grid.level_at(math.exp(-(here.lam + r * (there.lam - here.lam))))
        down, up = noise.step(here, middle)
        yield Row(here, landed(down) + up, {0: X, 1: X0})
        down, up = noise.step(here, there)
        x0 = (1 - 1 / (2 * r)) * slot(1) + 1 / (2 * r) * X0
        yield Row(middle, held(slot(0), x0, here, down) + up, begins=False)


@dataclass(frozen=True)
class Ancestral:
    """Noise after a step: down to sqrt(r'² - up²), then up = eta·r'·sqrt(r² - r'²)/r, which for
    eta = 1 is the variance of DDPM's posterior (Song et al. 2021, eq. 16).

    Args: eta: from 0 to 1. s_noise: scales what is put in.
    """

    eta: float
    s_noise: float

    def __post_init__(self) -> None:
        check_eta(self.eta)
        check_at_least_0("s_noise", self.s_noise)

    def step(self, here: Level, there: Level) -> tuple[Level, Form]:
        """Where a step is to land, in the scale of `there`, and the noise that goes on top."""
        up = self.eta * there.r * math.sqrt(1 - (there.r / here.r) ** 2)
        down = math.sqrt(there.r**2 - up**2)
        level = Level(there.signal, there.signal * down, there.time)
        return level, self.s_noise * there.signal * up * Z


@dataclass(frozen=True)
class Churn:
    """Noise before a step: r is raised to r̂ = (1 + γ)·r (Karras et al. 2022, algorithm 2).

    A row puts it in after the step before; the first step's is part of the noise that a run starts
    from, so that the table begins at r̂.

    Args: n: steps. s_churn, s_tmin, s_tmax: γ = min(s_churn/n, √2 - 1) where s_tmin <= r <= s_tmax.
        s_noise: scales what is put in.
    """

    n: int
    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            check_at_least_0(name, getattr(self, name))
        if not is_infinite(self.s_tmax):
            check_at_least_0("s_tmax", self.s_tmax)

    def steps(self, grid: Grid) -> Iterator:
        """(r̂'s level, the next level, a function to lift a sample from there to its r̂)."""
        levels = grid.levels()
        raised = [*(self.raised(grid, level) for level in levels[:-1]), levels[-1]]
        for i, there in enumerate(levels[1:], 1):
            yield raised[i - 1], there, partial(self._lift, there, raised[i])

    def raised(self, grid: Grid, level: Level) -> Level:
        """The level that a step from `level` starts at."""
        gamma = min(self.s_churn / self.n, math.sqrt(2) - 1)
        churns = gamma > 0 and level.sigma > 0 and self.s_tmin <= level.r <= self.s_tmax
        return grid.level_at((1 + gamma) * level.r) if churns else level

    def _lift(self, there: Level, raised: Level, sample: Form) -> Form:
        if raised is there:
            return sample
        noise = self.s_noise * math.sqrt(raised.r**2 - there.r**2)
        return raised.signal * (sample / there.signal + noise * Z)
