"""DPM-Solver++ (Lu et al. 2022): multistep solvers of the data prediction's ODE."""

from __future__ import annotations

import numpy as np

from . import grids
from .rows import table_of
from .schedules import NoiseSchedule, check_schedule
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
    check_schedule(schedule)
    grid = grids.spaced(schedule, steps, spacing)
    with np.errstate(divide="ignore"):  # lambda is infinite where there is no signal, or no noise
        h = np.log(grid.next_signal / grid.signal) - np.log(grid.next_sigma / grid.sigma)
    w = np.zeros(len(grid))
    w[1:-1] = h[1:-1] / (2 * h[:-2])
    shrunk = grid.next_sigma / grid.sigma
    weight = grid.next_signal - grid.signal * shrunk  # signal' (1 - e^-h)
    return table_of(
        grid,
        x=shrunk,
        x0=weight * (1 + w),
        before=-weight * w,
        clip=clip,
        prediction=prediction,
    )
