"""How a run calls its model: at a step that the host knows, or at a row that the device counts.

A network has `steps`, tensors [n, *] of which each step takes a row; `context`, which stays; and
call(inputs, step, context) -> the model's output. `at` and `at_row` give the same values.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as modules

from ..nn.context_unet import ContextUnet, UnetForward
from ..nn.optimized import OptimizedContextUnet


class CalledNetwork:
    """Any model(x [B,*], t [B], context).

    Args: times: [n], what the model is given before each step. batch: B.
    """

    def __init__(self, model: Callable, times: Tensor, values: list[float], context, batch: int):
        self.call, self.steps, self.context = model, times, context
        self._values, self._t = values, times.new_empty(batch)

    def at(self, i: int) -> Tensor:
        return self._t.fill_(self._values[i])

    def at_row(self, steps: Tensor, row: Tensor) -> Tensor:
        return steps.index_select(0, row).repeat(len(self._t))


class PreparedNetwork:
    """A network that embeds all times of a run, and its context, at once.

    Args: times: [n]. context: [B, n_cfeat], or [2B, n_cfeat] for guidance, or None.
    """

    def __init__(self, model: UnetForward, times: Tensor, context: Tensor | None):
        self.call = model.predict
        self.steps, self.context = model.prepare(times, context)

    def at(self, i: int) -> tuple[Tensor, ...]:
        return tuple(rows[i : i + 1] for rows in self.steps)

    def at_row(self, steps: tuple[Tensor, ...], row: Tensor) -> tuple[Tensor, ...]:
        return tuple(rows.index_select(0, row) for rows in steps)


def prepares(model) -> bool:
    """Whether a run may be prepared: nobody watches or has changed how the model is called."""
    if type(model) not in (ContextUnet, OptimizedContextUnet) or watched(model):
        return False
    return not {"predict", "prepare"} & vars(model).keys()


def watched(model: nn.Module) -> bool:
    """Whether somebody has hooks on a call of the model, or a forward of their own in it."""
    return modules._has_any_global_hook() or any(map(_is_watched, model.modules()))


def _is_watched(module: nn.Module) -> bool:
    changed = "forward" in vars(module) or module._compiled_call_impl is not None
    return bool(changed or module._forward_hooks or module._forward_pre_hooks)
