"""Linear multistep methods: the slopes of earlier steps, extrapolated over the next one.

In r = sigma/signal the ODE is d(x/signal)/dr = ε, so that each is x moved along some mean of ε.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from ..checks import check_choice
from . import grids
from .forms import EPS, X, carried, slot
from .grids import Grid
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable

# Of the slopes at equal distances, the last one first (Adams and Bashforth).
EVEN = {
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def lms(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "karras",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 4,
) -> StepTable:
    """The linear multistep method over r = sigma/signal: the polynomial through the last ε,
    integrated (Adams and Bashforth with uneven steps, as in k-diffusion).

    Args: as `ddim`; order: from 1 to 4; the first steps have fewer. Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3, 4))
    rule = partial(lms_rule, order=order)
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def lms_rule(grid: Grid, order: int) -> Iterator[Row]:
    levels = grid.levels()
    for i, (here, there) in enumerate(grid.steps()):
        nodes = [level.r for level in levels[max(i + 1 - order, 0) : i + 1]][::-1]
        weights = integrals(nodes, here.r, there.r)
        yield _along(i, weights / (there.r - here.r), here, there, order)


def deis(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 3,
) -> StepTable:
    """DEIS (Zhang & Chen 2023, tAB-DEIS): as `lms`, with its polynomial in log r.

    The last step is of first order. With fewer than 15 steps, the one before is of second at most.

    Args: as `ddim`; order: from 1 to 4. Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3, 4))
    rule = partial(deis_rule, order=order)
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def deis_rule(grid: Grid, order: int) -> Iterator[Row]:
    levels = grid.levels()
    for i, (here, there) in enumerate(grid.steps()):
        left = len(grid) - i
        of_step = min(order, i + 1, left if left == 1 or len(grid) < 15 else order)
        if of_step == 1:
            mean = np.ones(1)
        else:  # dr = e^u du, u = log r = -λ
            nodes = [-level.lam for level in levels[i + 1 - of_step : i + 1]][::-1]
            weights = there.r * integrals(nodes, -here.lam, -there.lam, rate=1.0)
            mean = weights / (there.r - here.r)
        yield _along(i, mean, here, there, order)


def ipndm(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 4,
) -> StepTable:
    """iPNDM (Zhang & Chen 2023, appendix): Adams and Bashforth's weights for steps of equal length,
    over the last ε; the first steps have fewer.

    Args: as `ddim`; order: from 1 to 4. Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3, 4))
    rule = partial(ipndm_rule, order=order)
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def ipndm_rule(grid: Grid, order: int) -> Iterator[Row]:
    for i, (here, there) in enumerate(grid.steps()):
        yield _along(i, EVEN[min(i + 1, order)], here, there, order)


def plms(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "leading",
    clip: float | None = None,
    prediction: str = "epsilon",
) -> StepTable:
    """PLMS, the pseudo linear multistep method (Liu et al. 2022, eq. 12), whose first step is made
    twice, the second time with the mean of ε at both its ends: n + 1 model calls.

    Args, returns and raises as `ddim`.
    """
    return tabulate(plms_rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def plms_rule(grid: Grid) -> Iterator[Row]:
    for i, (here, there) in enumerate(grid.steps()):
        if i == 0 and len(grid) > 1:
            yield Row(here, carried(X, EPS, here, there), {0: EPS, 1: X})
            yield Row(there, carried(slot(1), (EPS + slot(0)) / 2, here, there), begins=False)
        else:
            yield _along(i, EVEN[min(i + 1, 4)], here, there, 4)


def _along(i: int, mean: Sequence[float], here, there, order: int) -> Row:
    """Step i, along a mean of ε and of those before it; ε is kept where the oldest one was."""
    size = max(order - 1, 1)
    eps = sum((w * slot((i - j) % size) for j, w in enumerate(mean[1:], 1)), mean[0] * EPS)
    return Row(here, carried(X, eps, here, there), {i % size: EPS} if order > 1 else {})


def integrals(nodes: Sequence[float], start: float, end: float, rate: float = 0.0) -> np.ndarray:
    """∫ e^(rate·(u - end)) L_j(u) du from start to end, L_j Lagrange's polynomials of the nodes.

    Returns: float64, one for each node; by Gauss and Legendre, exact for polynomials, and to
    rounding for steps of rate·(end - start) up to 20.
    """
    at, weights = np.polynomial.legendre.leggauss(24)
    u = (start + end) / 2 + (end - start) / 2 * at
    weights = (end - start) / 2 * weights * np.exp(rate * (u - end))
    sums = []
    for j, node in enumerate(nodes):
        others = np.array([*nodes[:j], *nodes[j + 1 :]])
        polynomial = np.prod((u[:, None] - others) / (node - others), axis=1)
        sums.append(weights @ polynomial)
    return np.array(sums)
