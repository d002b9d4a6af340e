"""perturb: noising and the training target in one pass, by a table of signal and sigma."""

from __future__ import annotations

from . import reference
from .backend import kernels, needs_grad, register_fake, serves
from .layouts import empty_sum
from .reference import LEARNED


def perturb_by_table(x0, t, signal, sigma, noise=None, seeds=None, learned=LEARNED["noise"]):
    """The op, unchecked: x_t = signal[t]·x0 + sigma[t]·ε and what is learned of it.

    Args: signal, sigma: float32 [n] (float64 for a float64 x0); t: int64 [B], from 0 to n-1.
        learned: of LEARNED. Of a noise that is given, no second copy is written: an empty tensor.
    """
    native = serves(x0) and not needs_grad(x0, noise)
    op = kernels().perturb if native else reference.perturb
    return op(x0, t, signal, sigma, noise, seeds, learned)


@register_fake("perturb")
def _(x0, t, signal, sigma, noise, seeds, learned):
    written = learned == LEARNED["v"] or (learned == LEARNED["noise"] and noise is None)
    return empty_sum(x0), empty_sum(x0) if written else x0.new_empty(0)
