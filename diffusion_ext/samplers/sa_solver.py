"""SA-Solver (Xue et al. 2023): Adams' methods for the SDE, a predictor and a corrector."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from ..checks import check_at_least_0, check_choice, check_interval
from . import grids
from .adams import integrals
from .forms import X0, Form, X, Z, slot
from .grids import Grid, Level
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable

MOST_TAU = 1e3  # whose noise drowns all else


def sa_solver(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    interval: tuple[float, float] = (0.05, 1.0),
) -> StepTable:
    """SA-Solver of the data prediction (Xue et al. 2023, algorithm 1). The last steps are of lower
    order.

    Args:
        schedule, steps, spacing, clip, prediction: as `ddim`.
        order, corrector_order: of the predictor, from 1 to 4, and of the corrector, from 0 (none).
        tau: how much noise: 0 is the ODE, 1 the reverse SDE. interval: (low, high): tau is 0 at
            levels outside low <= sigma/signal <= high; the default is the paper's advice.

    Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3, 4))
    check_choice("corrector_order", corrector_order, (0, 1, 2, 3, 4))
    check_at_least_0("tau", tau)
    if tau > MOST_TAU:
        raise ValueError(f"tau: wanted at most {MOST_TAU:g}, got {tau}")
    check_interval("interval", interval)
    rule = partial(
        sa_solver_rule, order=order, corrector_order=corrector_order, tau=tau, interval=interval
    )
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def sa_solver_rule(
    grid: Grid, order: int, corrector_order: int, tau: float, interval: tuple[float, float]
) -> Iterator[Row]:
    """Slots: the last x0, and after them what the next row's corrector starts from."""
    levels, size = grid.levels(), max(order, corrector_order, 2) - 1
    start, of_start = None, 0.0  # the level and the τ of the step before
    for i, (here, there) in enumerate(grid.steps()):
        x0 = [X0, *(slot((i - j) % size) for j in range(1, min(i, size) + 1))]
        nodes = levels[: i + 1][::-1]
        known = sum(math.isfinite(node.lam) for node in nodes)  # λ of pure noise is -∞
        sample = X
        if corrector_order and i > 0 and math.isfinite(start.lam):
            now = min(corrector_order, known, len(grid) - i + 1)
            sample = slot(size) + _gradient(x0[:now], nodes[:now], start, here, of_start, True)
        of_step = tau if interval[0] <= here.r <= interval[1] else 0.0
        noised = of_step**2 * (there.lam - here.lam) if of_step else 0.0
        shrunk = math.exp(-noised) * there.sigma / here.sigma
        base = shrunk * sample + there.sigma * math.sqrt(-math.expm1(-2 * noised)) * Z
        now = max(min(order, known, len(grid) - i), 1)
        next = base + _gradient(x0[:now], nodes[:now], here, there, of_step, False)
        yield Row(here, next, {i % size: X0, size: base} if corrector_order else {i % size: X0})
        start, of_start = here, of_step


def _gradient(
    x0: list[Form], nodes: list[Level], here: Level, there: Level, tau: float, corrects: bool
) -> Form:
    """signal'·c·∫ e^(c·(λ - λ')) x0(λ) dλ from here to there, c = 1 + τ², x0 the polynomial through
    the nodes. With two nodes, the authors' code changes it by O(h³)."""
    c, h = 1 + tau**2, there.lam - here.lam
    if len(nodes) == 1:
        return there.signal * -math.expm1(-c * h) * x0[0]
    weights = c * integrals([node.lam for node in nodes], here.lam, there.lam, rate=c)
    if len(nodes) == 2:
        change = h**2 / 2 - (c * h + math.expm1(-c * h)) / c**2
        change *= c / (h if corrects else here.lam - nodes[1].lam)
        weights = [weights[0] + change, weights[1] - change]
    return sum((there.signal * w * x for w, x in zip(weights, x0, strict=True)), Form({}))
