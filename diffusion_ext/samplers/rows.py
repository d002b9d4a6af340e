"""Samplers as tables: a sampler is a pure function from a schedule to one row of numbers a call.

Every step of every sampler is the same arithmetic (x [B,*] the sample, m the model's output, z
normal noise, s_j what was remembered in slot j):

    x0 = clip(kx·x + km·m)
    x' = ax·x + am·m + a0·x0 + Σ_j aj·s_j + az·z

and up to two slots take a combination of the same terms. So adding a sampler is writing x', and
what is kept, as forms of x, x0, ε, z and the slots (see forms.py), from its paper, and nothing
else. The weights are computed in float64; the kernels read them as float32, whatever the sample's
dtype (in half precision the noise of the last steps would vanish).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..checks import check_choice, check_clip
from ..ops.row_shape import RowShape
from .forms import Form
from .grids import Grid, Level
from .row import Row, check_grid, check_rows, check_steps, rows_of
from .step_table import StepTable

__all__ = ["PREDICTIONS", "Row", "predictions", "table_of", "tabulate"]

PREDICTIONS = ("epsilon", "v", "x0", "flow")


def tabulate(
    rule: Callable[[Grid], Iterable[Row]],
    grid: Grid,
    clip: float | None,
    prediction: str,
    shape: RowShape | None = None,
) -> StepTable:
    """The table of the rows that a rule makes of a grid.

    Args:
        rule: a module's own function, or a partial of one, so that tables can be pickled; a run
            that starts at a later step asks it for the rows of the rest of the grid.
        clip, prediction: as `ddim`. shape: of the rows; None for the least that they need.

    Returns: StepTable of a row for each of the rule's. Raises: ValueError for more than a row can
    say, an unknown prediction, a bad clip, and levels that the rule has no step from.
    """
    check_grid(grid)
    try:
        with np.errstate(divide="ignore", invalid="ignore"):
            rows = rows_of(rule, grid)
    except (ZeroDivisionError, ValueError) as error:
        if (grid.signal > 0).all():
            raise
        raise _no_step(grid.timesteps[grid.signal == 0][0]) from error
    check_rows(rows, len(grid))
    read = set().union(*(f.slots for row in rows for f in (row.next, *row.keep.values())))
    rows = [replace(row, keep={j: row.keep[j] for j in row.keep if j in read}) for row in rows]
    # Where a step has more than one row, each counts down, for its noise to be its own.
    timesteps = grid.timesteps if len(rows) == len(grid) else np.arange(len(rows), 0, -1)
    signal, sigma, times = np.array([[r.at.signal, r.at.sigma, r.at.time] for r in rows]).T
    writes = []
    for i in range(max(len(row.keep) for row in rows)):
        kept = [list(row.keep.items())[i : i + 1] for row in rows]
        goes_to = np.array([k[0][0] if k else -1.0 for k in kept])
        writes.append((goes_to, _stacked([k[0][1] if k else Form({}) for k in kept])))
    begins = np.array([row.begins for row in rows])
    run = _Run(timesteps, times, signal, sigma, begins, grid.last, grid.train_timesteps)
    rest = _Rest(rule, grid, clip, prediction)
    next = _stacked([row.next for row in rows])
    return _assembled(run, next, writes, clip, prediction, rest, shape)


def table_of(grid: Grid, next: Form, *, clip: float | None, prediction: str) -> StepTable:
    """The table of a sampler that remembers nothing, a row for each step.

    Args: next: the next sample; its weights are arrays [n]. clip, prediction: as `ddim`.
    Returns: StepTable of n rows. Raises: as `tabulate`.
    """
    check_grid(grid)
    check_steps("next", next, len(grid))
    levels, begins = (grid.times, grid.signal, grid.sigma), np.ones(len(grid), dtype=bool)
    run = _Run(grid.timesteps, *levels, begins, grid.last, grid.train_timesteps)
    return _assembled(run, next, [], clip, prediction)


@dataclass(frozen=True)
class _Run:
    """What a table's rows start from, [n] each, and where the last one ends."""

    timesteps: np.ndarray
    times: np.ndarray
    signal: np.ndarray
    sigma: np.ndarray
    begins: np.ndarray
    last: Level
    train_timesteps: int


@dataclass(frozen=True)
class _Rest:
    """Makes the table of a run from one of its steps on, with nothing remembered before it."""

    rule: Callable
    grid: Grid
    clip: float | None
    prediction: str

    def __call__(self, step: int, shape: RowShape) -> StepTable:
        return tabulate(self.rule, self.grid.rest(step), self.clip, self.prediction, shape)


def _stacked(forms: list[Form]) -> Form:
    """Forms of numbers as one form of arrays [n]."""
    terms = {term: None for form in forms for term in form.weights}
    return Form({term: np.array([form.of(term) for form in forms]) for term in terms})


def _assembled(run, next, writes, clip, prediction, rest=None, shape=None) -> StepTable:
    """A StepTable of forms: next, and for each write (slot numbers [n], the form)."""
    check_choice("prediction", prediction, PREDICTIONS)
    check_clip(clip)
    if prediction == "epsilon" and (run.signal == 0).any():
        t = run.timesteps[run.signal == 0][0]
        raise ValueError(
            f"prediction: 'epsilon' cannot give x0 at t = {t}, where alpha_bar is 0 (zero terminal "
            "SNR); wanted a model that predicts 'v' or 'x0'"
        )
    forms = (next, *(form for _, form in writes))
    slots = 1 + max(set().union(*(form.slots for form in forms)), default=-1)
    if shape is not None:
        slots = shape.slots
    else:
        shape = RowShape(max(slots, 1), 0 if _keeps_x0(slots, writes) else len(writes))
    kx, km, *_ = levels = predictions(run.signal, run.sigma, prediction)
    weights = np.zeros((len(run.times), shape.width))
    # Where x0 is beyond float32 it is not to be had; finite weights keep 0·x0 from being NaN.
    weights[:, 0], weights[:, 1] = np.clip(kx, -1e30, 1e30), np.clip(km, -1e30, 1e30)
    weights[:, shape.next] = _combination(next, run, shape, clip, levels)
    weights[:, [shape.slot(i) for i in range(shape.writes)]] = -1.0
    for i, (goes_to, form) in enumerate(writes[: shape.writes]):
        weights[:, shape.slot(i)] = goes_to
        weights[:, shape.write(i)] = _combination(form, run, shape, clip, levels)
    finite = np.isfinite(weights).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        if (run.signal > 0).all():
            raise ValueError(f"weights: wanted finite numbers, got others in row {row}")
        raise _no_step(run.timesteps[row])
    signal, sigma = np.append(run.signal, run.last.signal), np.append(run.sigma, run.last.sigma)
    return StepTable(
        run.timesteps, weights, clip, run.train_timesteps, run.times,
        np.stack([signal, sigma], axis=1), slots, run.begins, rest if slots else None,
    )  # fmt: skip


def _no_step(t) -> ValueError:
    return ValueError(
        f"schedule: this sampler has no step from t = {t}, where alpha_bar is 0 (zero terminal "
        "SNR); wanted ddim, dpmpp_2m, unipc or sa_solver, or another schedule"
    )


def _keeps_x0(slots: int, writes) -> bool:
    """Whether all that is kept is each row's x0, in one slot; the last row's does not matter."""
    if slots != 1 or len(writes) != 1:
        return slots == 0
    goes_to, form = writes[0]
    only_x0 = all(np.all(weight == (term == "x0")) for term, weight in form.weights.items())
    return only_x0 and (goes_to == 0).all()


def _combination(form: Form, run, shape: RowShape, clip, levels) -> np.ndarray:
    """The weights of x, m, x0, the slots and z, float64 [n, 4 + S]."""
    x, x0, eps = form.of("x"), form.of("x0"), form.of("eps")
    kx, km, ex, em = levels
    if clip is None:  # x0 is linear in x and m: fold it, so that the kernel reads two weights
        ax, am, a0 = x + x0 * kx + eps * ex, x0 * km + eps * em, 0.0
    else:  # ε is what the clipped x0 leaves of x, so that the two still make up x
        ax, am, a0 = x + eps / run.sigma, 0.0, x0 - eps * run.signal / run.sigma
    columns = [ax, am, a0, *(form.of(j) for j in range(shape.slots)), form.of("z")]
    return np.stack([np.broadcast_to(column, len(run.times)) for column in columns], axis=1)


def predictions(signal: np.ndarray, sigma: np.ndarray, prediction: str):
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
