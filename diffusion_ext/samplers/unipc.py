"""UniPC (Zhao et al. 2023): a predictor, and a corrector of the sample that it predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..checks import check_bool, check_choice
from . import grids
from .forms import X0, Form, X, held, slot
from .grids import Grid, Level
from .rows import Row, tabulate
from .schedules import NoiseSchedule
from .step_table import StepTable


def unipc(
    schedule: NoiseSchedule,
    steps: int = 20,
    spacing: str = "trailing",
    clip: float | None = None,
    prediction: str = "epsilon",
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
) -> StepTable:
    """UniPC of the data prediction (Zhao et al. 2023, algorithms 1 and 2): a predictor of order p,
    which the corrector raises to p + 1 without a further call. The last steps are of lower order.

    Args:
        schedule, steps, spacing, clip, prediction: as `ddim`.
        order: p, from 1 to 3. variant: B(h), "bh1" is h and "bh2" e^h - 1.
        corrector: False for the predictor alone, UniP.

    Returns and raises as `ddim`.
    """
    check_choice("order", order, (1, 2, 3))
    check_bool("corrector", corrector)
    check_choice("variant", variant, ("bh1", "bh2"))
    rule = partial(unipc_rule, order=order, variant=variant, corrector=corrector)
    return tabulate(rule, grids.spaced(schedule, steps, spacing), clip, prediction)


def unipc_rule(grid: Grid, order: int, variant: str, corrector: bool) -> Iterator[Row]:
    """Slots: the last x0, and after them the sample that the last step started from."""
    levels, before = grid.levels(), 0
    size = order if corrector else max(order - 1, 1)
    for i, (here, there) in enumerate(grid.steps()):
        x0 = [slot((i - j) % size) for j in range(1, min(i, size) + 1)]
        nodes = levels[:i][::-1]
        known = sum(math.isfinite(node.lam) for node in nodes)  # λ of pure noise is -∞
        sample = X
        if corrector and known:
            before = min(before, known)
            sample = _step(slot(size), x0[:before], nodes[:before], here, variant, corrected=X0)
        before = min(order, len(grid) - i, 1 + known)
        next = _step(sample, [X0, *x0][:before], [here, *nodes][:before], there, variant)
        yield Row(here, next, {i % size: X0, size: sample} if corrector else {i % size: X0})


def _step(
    sample: Form,
    x0: list[Form],
    nodes: list[Level],
    there: Level,
    variant: str,
    corrected: Form | None = None,
) -> Form:
    """A step from nodes[0] to `there` with the x0 of the nodes, the last first, and, for the
    corrector, that of `there`: UniP and UniC of the data prediction (Zhao et al. 2023)."""
    here = nodes[0]
    h = there.lam - here.lam
    next = held(sample, x0[0], here, there)
    distances = [(node.lam - here.lam) / h for node in nodes[1:]]
    changes = [(x - x0[0]) / r for x, r in zip(x0[1:], distances, strict=True)]
    if corrected is not None:
        distances, changes = [*distances, 1.0], [*changes, corrected - x0[0]]
    if not changes:
        return next
    b = -h if variant == "bh1" else math.expm1(-h)
    for rho, change in zip(_rhos(distances, h, b), changes, strict=True):
        next -= there.signal * b * rho * change
    return next


def _rhos(distances: list[float], h: float, b: float) -> np.ndarray:
    """The weights of the changes: R·ρ = φ(h)/B(h), and 1/2 of a single one."""
    if len(distances) == 1:
        return np.array([0.5])
    hh, right, factorial = -h, [], 1
    phi = math.expm1(hh) / hh - 1
    for k in range(1, len(distances) + 1):
        right.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    powers = np.array([[r ** (k - 1) for r in distances] for k in range(1, len(distances) + 1)])
    return np.linalg.solve(powers, np.array(right))
