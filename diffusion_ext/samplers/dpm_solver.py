"""DPM-Solver++ (Lu et al. 2022): multistep solvers of the data prediction's ODE."""

from __future__ import annotations

from collections.abc import Iterator

from . import grids
from .forms import X0, X, slot
from .grids import Grid
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable


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
    return tabulate(_dpmpp_2m, grids.spaced(schedule, steps, spacing), clip, prediction)


def _dpmpp_2m(grid: Grid) -> Iterator[Row]:
    h_before = None
    for here, there in grid.steps():
        h, shrunk = there.lam - here.lam, there.sigma / here.sigma
        w = 0.0 if h_before is None or not there.sigma else h / (2 * h_before)
        weight = there.signal - here.signal * shrunk  # signal' (1 - e^-h)
        yield Row(here, shrunk * X + weight * ((1 + w) * X0 - w * slot(0)), {0: X0})
        h_before = h
