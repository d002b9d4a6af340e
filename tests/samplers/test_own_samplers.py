"""A sampler of somebody's own: what its forms and rows may not say is refused, and named."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from counterparts import SCHEDULE

from diffusion_ext.samplers import EPS, X0, Row, X, Z, grids, slot, table_of, tabulate

GRID = grids.spaced(SCHEDULE, 4, "trailing")


def made(row, grid=GRID):
    """The table of a rule that is row(i, here) in each step."""

    def rule(grid):
        for i, (here, _) in enumerate(grid.steps()):
            yield row(i, here)

    return tabulate(rule, grid, None, "epsilon")


NOT_LINEAR = [
    (lambda: EPS * EPS, "EPS: wanted a number to multiply it with, .* linear, got EPS"),
    (lambda: 0.5 * X0 * slot(1), r"0.5 \* X0: wanted a number to multiply it with.* got slot\(1\)"),
    (lambda: X0 / EPS, "X0: wanted a number to multiply it with, .* got EPS"),
    (lambda: X0 * "2", "X0: wanted a number .* got '2'"),
    (lambda: X0 * torch.ones(3), r"X0: wanted a number .* got a tensor of torch.float32 \[3\]"),
    (lambda: X0 + 1, "X0: wanted another term of a row to add, like 0.5 . EPS, got 1"),
    (lambda: 1 + X0, "X0: wanted another term of a row to add, .* got 1"),
    (lambda: (X - 0.5 * Z) - None, "X . -0.5 . Z: wanted another term .* got None"),
    (lambda: np.ones(4) + X0, "X0: wanted another term of a row to add, .* got ndarray"),
    (lambda: np.ones(4) * X0 + 1, r"\[4\] . X0: wanted another term"),
    (lambda: 1 / X0, "X0: wanted only sums and multiples, .* got a power"),
    (lambda: X0**2, "X0: wanted only sums and multiples, .* got a power"),
    (lambda: slot("a"), "slot: wanted an int, got str"),
]


@pytest.mark.parametrize(("form", "message"), NOT_LINEAR)
def test_a_form_is_linear(form, message):
    with pytest.raises(TypeError, match=message):
        form()


def test_a_form_says_what_it_is():
    assert str(0.5 * X0 - EPS + slot(2)) == "0.5 * X0 + -1 * EPS + slot(2)"


BAD_ROWS = [
    (lambda i, here: (here, X0), TypeError, "rule: wanted Rows, got tuple for row 0"),
    (lambda i, here: Row(0.5, X0), TypeError, "at: wanted a Level, .* got float"),
    (lambda i, here: Row(here, 3), TypeError, "next: wanted a sum of terms, .* got int"),
    (lambda i, here: Row(here, X0, [X]), TypeError, "keep: wanted a dict like .* got list"),
    (lambda i, here: Row(here, X0, {0: 2}), TypeError, r"keep\[0\]: wanted a sum of terms"),
    (lambda i, here: Row(here, X0, {"a": X}), TypeError, "keep, the number .* got str"),
    (lambda i, here: Row(here, X0, begins=1), TypeError, "begins: wanted True or False"),
    (
        lambda i, here: Row(here, X0, {0: X, 1: X0, 2: EPS}),
        ValueError,
        r"rule: wanted at most 2 slots that a row keeps, got \[0, 1, 2\] in row 0",
    ),
    (
        lambda i, here: Row(here, X0 + slot(0), {0: X}),
        ValueError,
        r"rule: wanted slots that a row before has kept, got slot\(0\) in row 0",
    ),
    (
        lambda i, here: Row(here, X0 + slot(1) if i == 2 else X0, {0: X}),
        ValueError,
        r"rule: wanted slots that a row before has kept, got slot\(1\) in row 2",
    ),
    (
        lambda i, here: Row(here, X0, {0: X, 1: 0.5 * slot(1)} if i else {0: X}),
        ValueError,
        r"rule: wanted slots .* got slot\(1\) in row 1",
    ),
    (lambda i, here: Row(here, X0, {6: X}), ValueError, "rule: wanted slots from 0 to 5, got 6"),
    (lambda i, here: Row(here, X0, {-1: X}), ValueError, "rule: wanted slots from 0 to 5, got -1"),
    (
        lambda i, here: Row(here, GRID.signal * X0),
        ValueError,
        r"rule: wanted weights that are numbers, .* got an array \[4\] in row 0",
    ),
    (
        lambda i, here: Row(here, (math.nan if i == 1 else 1.0) * X0),
        ValueError,
        "weights: wanted finite numbers, got others in row 1",
    ),
    (
        lambda i, here: Row(here, X0, begins=i > 0),
        ValueError,
        "rule: wanted a row for each of the grid's 4 steps, got 3",
    ),
]


@pytest.mark.parametrize(("row", "error", "message"), BAD_ROWS)
def test_what_no_row_can_say(row, error, message):
    with pytest.raises(error, match=message):
        made(row)


def test_a_row_with_too_many_slots_is_not_the_fault_of_a_schedule_without_signal():
    grid = grids.spaced(SCHEDULE.zero_terminal_snr(), 4, "trailing")
    with pytest.raises(ValueError, match="rule: wanted at most 2 slots"):
        made(lambda i, here: Row(here, X, {0: X, 1: X, 2: X}), grid)


BAD_TABLES = [
    (lambda: tabulate(3, GRID, None, "v"), TypeError, "rule: wanted a function .* got int"),
    (lambda: tabulate(print, GRID, None, "v"), TypeError, "yields Rows, got one of NoneType"),
    (lambda: tabulate(lambda _: [], GRID, None, "v"), ValueError, "4 steps, got 0"),
    (lambda: tabulate(made, SCHEDULE, None, "v"), TypeError, "grid: wanted .* got NoiseSchedule"),
    (lambda: whole(X0, grid=SCHEDULE), TypeError, "grid: wanted a Grid, .* got NoiseSchedule"),
    (lambda: whole(np.ones(4)), TypeError, "next: wanted a sum of terms, .* got ndarray"),
    (lambda: whole(X0 + slot(2)), ValueError, r"next: wanted terms .* got slot\(2\)"),
    (lambda: whole(np.ones(3) * X0), ValueError, r"next: wanted weights .* \[4\].* shape \[3\]"),
    (lambda: whole(math.inf * X0), ValueError, "weights: wanted finite numbers, .* row 0"),
]


def whole(next, grid=GRID):
    return table_of(grid, next, clip=None, prediction="epsilon")


@pytest.mark.parametrize(("call", "error", "message"), BAD_TABLES)
def test_what_is_no_rule_and_no_form(call, error, message):
    with pytest.raises(error, match=message):
        call()
