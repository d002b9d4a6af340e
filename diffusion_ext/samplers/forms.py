"""What a row adds up, written as its paper does: there.signal * X0 + there.sigma * EPS."""

from __future__ import annotations

import numpy as np

__all__ = ["EPS", "X0", "Form", "X", "Z", "slot"]


class Form:
    """A linear combination of the terms of a row, whose weights are numbers or arrays [n] of them.

    Args: weights: term -> weight. The terms are "x", the sample; "x0" and "eps", what the model
        predicts of it; "z", noise; and the numbers of slots.
    """

    __array_ufunc__ = None  # an array times a form is this class's to say

    def __init__(self, weights: dict):
        self.weights = weights

    def __add__(self, other: Form) -> Form:
        terms = {**self.weights, **other.weights}
        return Form({t: self.weights.get(t, 0.0) + other.weights.get(t, 0.0) for t in terms})

    def __mul__(self, number) -> Form:
        return Form({term: weight * number for term, weight in self.weights.items()})

    __rmul__ = __mul__

    def __truediv__(self, number) -> Form:
        return self * (1 / number)

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        return self + -other

    def of(self, term):
        """The weight of a term."""
        return self.weights.get(term, 0.0)

    @property
    def slots(self) -> set[int]:
        """The numbers of the slots that it reads."""
        return {t for t, weight in self.weights.items() if isinstance(t, int) and np.any(weight)}


X, X0, EPS, Z = (Form({term: 1.0}) for term in ("x", "x0", "eps", "z"))


def slot(number: int) -> Form:
    """What the row found in a slot, counted from 0."""
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
