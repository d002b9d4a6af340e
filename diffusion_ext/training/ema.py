"""An exponential moving average of a model's weights: the one to sample with."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class ExponentialMovingAverage:
    """Keeps `model`, an averaged copy of the model given, in evaluation mode.

    The decay warms up as (1 + n) / (10 + n) over the first updates, so that the random initial
    weights are soon forgotten. Floating point buffers (BatchNorm's running statistics) are
    averaged along with the weights they belong to; the others are copied.

    Args: decay in [0, 1), the largest. Raises: ValueError.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay: wanted 0 <= ema_decay < 1, got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves the average towards `model`, whose weights have been updated `step` times."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = model.state_dict()
        pairs = [(average, current[name]) for name, average in self.model.state_dict().items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)(*map(list, zip(*floating, strict=True)), step)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
