"""A moving average of a model's weights: the one to sample with."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .sharding import local


class ExponentialMovingAverage:
    """Keeps `model`, an averaged copy of the model given, in evaluation mode.

    The decay warms up as (1 + n) / (10 + n) over the first updates, so that the random initial
    weights are soon forgotten. Floating point buffers (BatchNorm's running statistics) are
    averaged along with the weights they belong to; the others are copied.

    Args:
        decay: in [0, 1), the largest.
        std: in its place, the width of a power-function average relative to the length of the run
            so far, above 0 and below 0.28 (Karras et al. 2024, section 3.1).

    Raises: ValueError.
    """

    def __init__(self, model: nn.Module, decay: float = 0.995, std: float | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: wanted 0 <= ema_decay < 1, got {decay}")
        self.decay, self.exponent = decay, None if std is None else power_of(std)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, step: int) -> float:
        """How much of the average the update after `step` updates of the weights leaves."""
        if self.exponent is not None:
            return (1 - 1 / step) ** (self.exponent + 1)
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards `model`, whose weights have been updated `step` times."""
        current = model.state_dict()
        averages = self.model.state_dict()
        pairs = [(local(average), local(current[name])) for name, average in averages.items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        averages, values = map(list, zip(*floating, strict=True))
        get_ema_multi_avg_fn(self.decay_at(step))(averages, values, step)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)


def power_of(std: float) -> float:
    """γ of the average with weights t^γ whose relative width is std: σ² = (γ+1)/((γ+2)²(γ+3)).

    Raises: ValueError where there is none, for std above √(1/12).
    """
    if not 0 < std < (1 / 12) ** 0.5:
        raise ValueError(f"ema_std: wanted 0 < ema_std < 0.288, got {std}")
    cubic = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return float(max(cubic.real[abs(cubic.imag) < 1e-9]))
