"""DPM-Solver++'s multistep solvers (Lu et al. 2022b): the data prediction over λ, and its changes.

λ = log(signal/sigma). The ODE and, with eta, the SDE are linear in x, whose part is solved exactly;
what is integrated is a polynomial of λ through the last x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from ..checks import check_at_least_0, check_choice
from . import grids
from .forms import X0, Form, X, Z, slot
from .grids import Grid
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable

SOLVERS = ("midpoint", "heun")


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 2,
    solver: str = "midpoint",
) -> StepTable:
    """DPM-Solver++(2M), second order, one model call a step (Lu et al. 2022b, algorithm 2).

    With λ = log(signal/sigma), h = λ' - λ and D = (1 + w)·x0 - w·x0_before, w = h/(2·h_before):
    x' = sigma'/sigma·x + signal'·(1 - e^-h)·D. The first and the last step are of first order.

    Args:
        schedule, steps, spacing, clip, prediction: as `ddim`.
        order: from 1 to 3; order 3 takes x0's second difference too, and its last step but one has
            order 2 where there are fewer than 15.
        solver: what the first difference of x0 is weighted with, "midpoint" or "heun".

    Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3))
    return _tabulated(schedule, steps, spacing, clip, prediction, order, solver, 0.0, 0.0, True)


def dpmpp_2m_sde(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
) -> StepTable:
    """DPM-Solver++(2M) for the SDE (Lu et al. 2022b, SDE-DPM-Solver++).

    Args: as `dpmpp_2m`; eta: 0 is `dpmpp_2m`, 1 the reverse SDE; s_noise: scales the noise.
    Returns and raises as `ddim`.
    """
    return _tabulated(schedule, steps, spacing, clip, prediction, 2, solver, eta, s_noise)


def dpmpp_3m_sde(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> StepTable:
    """DPM-Solver++(3M) for the SDE, the second difference of x0 too (as in k-diffusion).

    Args, returns and raises as `dpmpp_2m_sde`.
    """
    return _tabulated(schedule, steps, spacing, clip, prediction, 3, "heun", eta, s_noise)


def _tabulated(
    schedule, steps, spacing, clip, prediction, order, solver, eta, s_noise, ends_lower=False
) -> StepTable:
    check_choice("solver", solver, SOLVERS)
    check_at_least_0("eta", eta)
    check_at_least_0("s_noise", s_noise)
    rule = partial(
        multistep_rule, order=order, solver=solver, eta=eta, s_noise=s_noise, ends_lower=ends_lower
    )
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def multistep_rule(
    grid: Grid, order: int, solver: str, eta: float, s_noise: float, ends_lower: bool
) -> Iterator[Row]:
    """x' = e^-(eta·h)·sigma'/sigma·x + signal'·(1 - e^-g)·D + noise, g = (1 + eta)·h."""
    slots, hs = max(order - 1, 1), []
    for i, (here, there) in enumerate(grid.steps()):
        h = there.lam - here.lam
        noised = eta * h if eta else 0.0  # h may be infinite
        g = h + noised
        left = len(grid) - i if ends_lower and len(grid) < 15 else order
        of_step = min(order, i + 1, left) if there.sigma else 1
        shrunk = math.exp(-noised) * there.sigma / here.sigma
        next = shrunk * X - there.signal * math.expm1(-g) * X0
        if of_step > 1:
            past = [slot((i - j) % slots) for j in range(1, of_step)]
            next += there.signal * _changes(g, h, hs[::-1], past, solver)
        noise = s_noise * there.sigma * math.sqrt(-math.expm1(-2 * noised))
        keep = {i % slots: X0} if order > 1 else {}
        yield Row(here, next + noise * Z, keep)
        hs.append(h)


def _changes(g: float, h: float, before: list[float], past: list[Form], solver: str) -> Form:
    """What the differences of x0 add to a step of length h in λ; before: the lengths, last first.

    The second difference is weighted as the authors' code does it, by half of what would make the
    method one of third order.
    """
    phi_1 = -math.expm1(-g)  # 1 - e^-g
    phi_2 = 1 - phi_1 / g
    first = (X0 - past[0]) * (h / before[0])
    if len(past) == 1:
        return (phi_1 / 2 if solver == "midpoint" else phi_2) * first
    r0, r1 = before[0] / h, before[1] / h
    second = (first - (past[0] - past[1]) / r1) / (r0 + r1)
    phi_3 = phi_2 / g - 0.5
    return phi_2 * (first + r0 * second) - phi_3 * second
