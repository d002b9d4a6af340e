"""What a row adds up, written as its paper does: there.signal * X0 + there.sigma * EPS."""

from __future__ import annotations

import numbers
from typing import NoReturn

import numpy as np

from ..checks import check_int, shown

__all__ = ["EPS", "X0", "Form", "X", "Z", "slot"]


class Form:
    """A linear combination of the terms of a row, whose weights are numbers or arrays [n] of them.

    Args: weights: term -> weight. The terms are "x", the sample; "x0" and "eps", what the model
        predicts of it; "z", noise; and the numbers of slots.

    Forms are added, and multiplied by numbers. Raises: TypeError for what is not linear.
    """

    __array_ufunc__ = None  # an array times a form is this class's to say

    def __init__(self, weights: dict):
        self.weights = weights

    def __add__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            self._refuse_to_add(other)
        terms = {**self.weights, **other.weights}
        return Form({t: self.weights.get(t, 0.0) + other.weights.get(t, 0.0) for t in terms})

    def __mul__(self, number) -> Form:
        if not _is_weight(number):
            self._refuse_to_multiply(number)
        return Form({term: weight * number for term, weight in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, number) -> Form:
        if not _is_weight(number):
            self._refuse_to_multiply(number)
        return self * (1 / number)

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            self._refuse_to_add(other)
        return self + -other

    def _refuse_to_add(self, other) -> NoReturn:
        raise TypeError(
            f"{self}: wanted another term of a row to add, like 0.5 * EPS, got {shown(other)}"
        )

    def _refuse_to_multiply(self, other) -> NoReturn:
        got = other if isinstance(other, Form) else shown(other)
        raise TypeError(
            f"{self}: wanted a number to multiply it with, or an array of one for each step, for a "
            f"row is linear, got {got}"
        )

    def _refuse_a_power(self, _) -> NoReturn:
        raise TypeError(f"{self}: wanted only sums and multiples, for a row is linear, got a power")

    __radd__ = __rsub__ = _refuse_to_add
    __rtruediv__ = __pow__ = __rpow__ = _refuse_a_power

    def __repr__(self) -> str:
        return " + ".join(f"{_shown_weight(w)}{_name(t)}" for t, w in self.weights.items()) or "0"

    def of(self, term):
        """The weight of a term."""
        return self.weights.get(term, 0.0)

    @property
    def slots(self) -> set[int]:
        """The numbers of the slots that it reads."""
        return {t for t, weight in self.weights.items() if isinstance(t, int) and np.any(weight)}


def _is_weight(value) -> bool:
    """Whether it is a number, or an array of them."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "buif"
    return isinstance(value, (numbers.Real, np.bool_))


def _name(term) -> str:
    return f"slot({term})" if isinstance(term, int) else term.upper()


def _shown_weight(weight) -> str:
    if np.ndim(weight):
        return f"[{len(weight)}] * "
    return "" if weight == 1 else f"{weight:.4g} * "


X, X0, EPS, Z = (Form({term: 1.0}) for term in ("x", "x0", "eps", "z"))


def slot(number: int) -> Form:
    """What the row found in a slot, counted from 0."""
    check_int("slot", number)
    return Form({number: 1.0})


def landed(there) -> Form:
    """The sample at a level, made of x0 and ε: Euler's step, and DDIM's (Song et al. 2021)."""
    return there.signal * X0 + there.sigma * EPS


def carried(sample: Form, eps: Form, here, there) -> Form:
    """A sample moved from level to level along ε: x/signal changes by (r' - r)·ε."""
    ratio = there.signal / here.signal
    return ratio * sample + (there.sigma - ratio * here.sigma) * eps


def held(sample: Form, x0: Form, here, there) -> Form:
    """A sample moved from level to level with x0 held: sigma'/sigma·x + signal'·(1 - e^-h)·x0
    (Lu et al. 2022b, of first order)."""
    shrunk = there.sigma / here.sigma
    return shrunk * sample + (there.signal - here.signal * shrunk) * x0
