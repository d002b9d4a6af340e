"""TableScheduler: DDPM and DDIM, whose every step is a row of one table, by its timestep."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...ops.sampler_step import COLUMNS, sampler_step
from .fused_scheduler import FusedScheduler, alike
from .noising import INTEGERS
from .rows import PREDICTIONS
from .runs import Run

A0, AH = COLUMNS.index("a0"), COLUMNS.index("ah")


class TableScheduler(FusedScheduler):
    """Mixed in before a diffusers scheduler. A subclass says what makes up a run and its rows:

    _held() -> (timesteps, alphas_cumprod, whatever else changes the rows);
    _previous(timesteps [n]) -> int64 [T]; _weights(run, *options) -> float64 [T, 7].
    """

    def _start_run(self, device) -> None:
        """After diffusers' set_timesteps on the host: keep that copy, and move its tensor."""
        # Rounding can give "trailing" one timestep too many, -1, from which there is no step.
        host = self.timesteps[self.timesteps >= 0]
        self.timesteps = host.to(device)
        timesteps = host.numpy().copy()
        self._run = self._new_run(timesteps)

    def _current_run(self) -> Run:
        if self._run is None or not self._run.holds(self._all_held()):
            self._run = self._new_run(self.timesteps.cpu().numpy().copy())
        return self._run

    def _new_run(self, timesteps: np.ndarray) -> Run:
        previous = self._previous(timesteps)
        return Run(self._all_held(), timesteps, previous, self.exact_coefficients)

    def _all_held(self) -> tuple:
        return *self._held(), self.exact_coefficients

    def _clipped(self) -> bool:
        return bool(self.config.thresholding or self.config.clip_sample)

    def _fits(self, model_output, timestep, sample) -> bool:
        """Whether rows can say this step; if not, it is diffusers' to do or to refuse."""
        c = self.config
        return (
            alike(model_output, sample)
            and sample.dim() > 0
            and _is_timestep(timestep)
            and c.prediction_type in PREDICTIONS
            and (c.thresholding or not c.clip_sample or 0 < c.clip_sample_range < math.inf)
        )

    def _locate(self, run: Run, timestep, sample: Tensor) -> tuple[int | None, Tensor]:
        """(t, its row): t on the host where it is known there, row [] int64 on sample's device."""
        t = run.read(timestep)
        if t is None:
            return None, timestep.reshape(()).to(sample.device, torch.int64)
        run.check(t)
        if run.alpha_bar[t] == 0:
            self._check_signal(t)
        return t, run.rows(sample.device)[t]

    def _check_signal(self, t: int) -> None:
        c = self.config
        if c.prediction_type == "epsilon" and (c.thresholding or not c.clip_sample):
            raise ValueError(
                f"prediction_type: 'epsilon' cannot give x0 at timestep {t}, where alphas_cumprod "
                "is 0 (zero terminal SNR); wanted 'v_prediction' or 'sample', or timesteps "
                "without it"
            )

    def _apply(self, run, options, model_output, sample, row, noise, seeds):
        """(x', x0) [B, *] of a row, in the dtype that model_output and sample promote to."""
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        x, m = sample.to(dtype), model_output.to(dtype)
        noise = None if noise is None else noise.to(dtype)
        table, steps = run.table(options, x.device, dtype, self._table_weights)
        if not self.config.thresholding:
            clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
            return sampler_step(x, m, table, steps, row, noise, seeds, clip=clip, return_x0=True)
        # The threshold is a quantile of the whole x0: two passes, the second given x0 as history.
        _, x0 = sampler_step(x, m, table, steps, row, return_x0=True)
        x0 = self._threshold_sample(x0)
        return sampler_step(x, m, table, steps, row, noise, seeds, history=x0), x0

    def _table_weights(self, run, *options) -> np.ndarray:
        rows = self._weights(run, *options)
        if self.config.thresholding:
            rows[:, AH], rows[:, A0] = rows[:, A0].copy(), 0
        return rows


def _is_timestep(timestep) -> bool:
    if isinstance(timestep, Tensor):
        return timestep.numel() == 1 and timestep.dtype in INTEGERS
    return hasattr(timestep, "__index__")
