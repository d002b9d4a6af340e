"""Row: what follows a call of the model, as a rule says it; and what a rule may not say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ..checks import check_bool, check_int, kind
from ..ops.row_shape import MOST_SLOTS, MOST_WRITES
from .forms import Form
from .grids import Grid, Level


@dataclass(frozen=True)
class Row:
    """A call of the model and what follows from it.

    Attributes:
        at: the level of the sample that the model is given.
        next: the next sample.
        keep: slot -> what it receives; at most two.
        begins: whether a step begins with it; False for the further calls of a step.
    """

    at: Level
    next: Form
    keep: dict[int, Form] = field(default_factory=dict)
    begins: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.at, Level):
            raise TypeError(f"at: wanted a Level, of those of grid.steps(), got {kind(self.at)}")
        check_form("next", self.next)
        if not isinstance(self.keep, dict):
            raise TypeError(f"keep: wanted a dict like {{0: EPS}}, got {kind(self.keep)}")
        for number, form in self.keep.items():
            check_int("keep, the number of a slot", number)
            check_form(f"keep[{number}]", form)
        check_bool("begins", self.begins)


def check_grid(grid) -> None:
    if not isinstance(grid, Grid):
        raise TypeError(
            "grid: wanted a Grid, such as grids.spaced(schedule, 20, 'trailing') returns, "
            f"got {kind(grid)}"
        )


def check_form(name: str, form) -> None:
    if not isinstance(form, Form):
        raise TypeError(f"{name}: wanted a sum of terms, like 0.5 * X0 + EPS, got {kind(form)}")


def check_steps(name: str, form, steps: int) -> None:
    """form says each of so many steps: by a weight for all, or one for each. No slot is kept."""
    check_form(name, form)
    if form.slots:
        raise ValueError(
            f"{name}: wanted terms that are not kept, got slot({min(form.slots)}): a rule of Rows "
            "keeps slots (tabulate)"
        )
    for weight in form.weights.values():
        if np.shape(weight) not in ((), (steps,)):
            raise ValueError(
                f"{name}: wanted weights that are numbers or arrays [{steps}], for each step one, "
                f"got shape {list(np.shape(weight))}"
            )


def rows_of(rule: Callable[[Grid], Iterable[Row]], grid: Grid) -> list[Row]:
    """The rows that a rule makes of a grid, each of which says what a row can.

    Raises: TypeError, ValueError, which name the row by its number; and what the rule raises.
    """
    if not callable(rule):
        raise TypeError(f"rule: wanted a function of a grid that yields Rows, got {kind(rule)}")
    made = rule(grid)
    if not isinstance(made, Iterable):
        raise TypeError(f"rule: wanted a function that yields Rows, got one of {kind(made)}")
    return list(made)


def check_rows(rows: list[Row], steps: int) -> None:
    """Rows of so many steps, whose weights are numbers, each of which keeps two slots at most and
    reads none that no row before it has kept.

    Raises: TypeError, ValueError, which count the rows from 0.
    """
    kept: set[int] = set()
    for i, row in enumerate(rows):
        if not isinstance(row, Row):
            raise TypeError(f"rule: wanted Rows, got {kind(row)} for row {i}")
        if len(row.keep) > MOST_WRITES:
            raise ValueError(
                f"rule: wanted at most {MOST_WRITES} slots that a row keeps, got "
                f"{sorted(row.keep)} in row {i}"
            )
        _check_reads(i, row, kept)
        kept |= row.keep.keys()
    begun = sum(row.begins for row in rows)
    if begun != steps:
        raise ValueError(
            f"rule: wanted a row for each of the grid's {steps} steps, got {begun} "
            "(further calls within a step have begins=False)"
        )


def _check_reads(i: int, row: Row, kept: set[int]) -> None:
    forms = (row.next, *row.keep.values())
    for weight in (weight for form in forms for weight in form.weights.values()):
        if np.ndim(weight):
            raise ValueError(
                "rule: wanted weights that are numbers, such as a level of grid.steps() has, got "
                f"an array {list(np.shape(weight))} in row {i}"
            )
    read = set().union(*(form.slots for form in forms))
    for number in sorted(read | row.keep.keys()):
        if not 0 <= number < MOST_SLOTS:
            raise ValueError(
                f"rule: wanted slots from 0 to {MOST_SLOTS - 1}, got {number} in row {i}"
            )
    if read - kept:
        raise ValueError(
            "rule: wanted slots that a row before has kept, "
            f"got slot({min(read - kept)}) in row {i}"
        )
