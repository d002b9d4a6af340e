"""What a network is trained for: images noised, and the loss of what it makes of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..ops.denoising_loss import loss_and_gradient, loss_by_table
from ..ops.perturb import LEARNED, perturb_by_table
from ..samplers.noising import NOISINGS, tables_of, target_weights
from ..samplers.rows import predictions
from ..samplers.schedules import NoiseSchedule
from .config import TrainingConfig


class Objective:
    """The objective of a run, on its device.

    The noise is a function of an image's seed and timestep: it is made in the kernel that adds it
    to the image, and again in the one that takes the loss, and lies in no tensor.

    Attributes: weights: float32 [T+1] by timestep, or None where all are 1.
    """

    def __init__(self, config: TrainingConfig, schedule: NoiseSchedule, device: torch.device):
        self.prediction, self.huber = config.prediction, config.huber
        self.noising = tables_of(schedule, NOISINGS[config.path], device, torch.float32)
        names = target_weights(config.prediction, config.path)
        self.target = tables_of(schedule, names, device, torch.float32)
        self.weights = None
        if config.min_snr is not None:
            weights = min_snr_weights(schedule, config)
            self.weights = torch.from_numpy(weights).to(device, torch.float32)

    def noised(self, x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        """x_t [B,C,H,W]; t, seeds: int64 [B]."""
        return perturb_by_table(x0, t, *self.noising, None, seeds, LEARNED[None])[0]

    def losses(self, output: Tensor, x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        """[B], not weighted; output: the network's, of x_t."""
        return loss_by_table(output, t, *self.target, *self._terms(x0, seeds), self.huber)

    def losses_and_gradient(self, output, x0, t, seeds, upstream: Tensor):
        """The losses [B], not weighted, and the gradient by output of Σ upstream·weight·loss.

        Args: upstream: float32 [B].
        """
        if self.weights is not None:
            upstream = upstream * self.weights[t]
        terms = self._terms(x0, seeds)
        return loss_and_gradient(output, t, *self.target, *terms, self.huber, upstream)

    def weighted(self, losses: Tensor, t: Tensor) -> Tensor:
        """[B]"""
        return losses if self.weights is None else losses * self.weights[t]

    def _terms(self, x0: Tensor, seeds: Tensor):
        """(x0, noise, seeds): what the target is made of."""
        return (
            None if self.prediction == "epsilon" else x0,
            None,
            None if self.prediction == "x0" else seeds,
        )


def min_snr_weights(schedule: NoiseSchedule, config: TrainingConfig) -> np.ndarray:
    """float64 [T+1]: min(SNR, γ), as a weight of the loss of x0, turned into that of what the
    network predicts (Hang et al. 2023, section 3.4): x0 = kx·x + km·m, so by km².
    """
    signal, sigma = (schedule.values(name) for name in NOISINGS[config.path])
    weights = np.zeros_like(signal)  # at 0 there is no noise to predict
    signal, sigma = signal[1:], sigma[1:]
    snr = (signal / sigma) ** 2
    if config.prediction == "epsilon":  # where the signal is 0, the limit
        weights[1:] = np.minimum(1, config.min_snr / np.maximum(snr, 1e-300))
        return weights
    _, km, *_ = predictions(signal, sigma, config.prediction)
    weights[1:] = np.minimum(snr, config.min_snr) * km**2
    return weights
