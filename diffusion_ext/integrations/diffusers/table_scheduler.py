"""TableScheduler: DDPM and DDIM, whose every step is a row of one table, by its timestep."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ...ops.sampler_step import COLUMNS, sampler_step, step_of_row
from .fused_scheduler import FusedScheduler, alike
from .noising import INTEGERS
from .rows import PREDICTIONS
from .runs import TableRun

A0, AH = COLUMNS.index("a0"), COLUMNS.index("ah")


class TableScheduler(FusedScheduler):
    """Mixed in before a diffusers scheduler. A subclass says what makes up a run and its rows:

    _previous(timesteps [n]) -> int64 [T]; _weights(run, *options) -> float64 [T, 7].
    """

    def _start_run(self, device) -> None:
        """After diffusers' set_timesteps on the host: keep that copy, and move its tensor."""
        # Rounding can give "trailing" one timestep too many, -1, from which there is no step.
        host = self.timesteps[self.timesteps >= 0]
        self.timesteps = host.to(device)
        timesteps = host.numpy().copy()
        self._run = self._new_run(timesteps)

    def _current_run(self) -> TableRun:
        if self._run is None or not self._run.holds(self.__dict__):
            self._run = self._new_run(self.timesteps.cpu().numpy().copy())
        return self._run

    def _new_run(self, timesteps: np.ndarray) -> TableRun:
        return TableRun(self, timesteps, self._previous(timesteps), self._run)

    def _clipped(self) -> bool:
        return bool(self.config.thresholding or self.config.clip_sample)

    def _fits(self, model_output, timestep, sample) -> bool:
        """Whether rows can say this step; if not, it is diffusers' to do or to refuse."""
        c = self.config
        return (
            alike(model_output, sample)
            and _is_timestep(timestep)
            and c.prediction_type in PREDICTIONS
            and (c.thresholding or not c.clip_sample or 0 < c.clip_sample_range < math.inf)
        )

    def _locate(self, run: TableRun, timestep) -> int | None:
        """The timestep where the host knows it. Raises: IndexError, ValueError for one that the
        run cannot step from."""
        t = run.read(timestep)
        if t is not None:
            run.check(t)
            if run.alpha_bar[t] == 0:
                self._check_signal(t)
        return t

    def _check_signal(self, t: int) -> None:
        c = self.config
        if c.prediction_type == "epsilon" and (c.thresholding or not c.clip_sample):
            raise ValueError(
                f"prediction_type: 'epsilon' cannot give x0 at timestep {t}, where alphas_cumprod "
                "is 0 (zero terminal SNR); wanted 'v_prediction' or 'sample', or timesteps "
                "without it"
            )

    def _apply(self, run, options, model_output, sample, t, timestep, noise, seeds):
        """(x', x0) [B, *] of a timestep, in the dtype that model_output and sample promote to."""
        x, m = sample, model_output
        if x.dtype != m.dtype or (noise is not None and noise.dtype != x.dtype):
            dtype = torch.promote_types(m.dtype, x.dtype)
            x, m, noise = x.to(dtype), m.to(dtype), None if noise is None else noise.to(dtype)
        step = self._row_step(run, options, x, t, timestep)
        if not self.config.thresholding:
            clip = float(self.config.clip_sample_range) if self.config.clip_sample else None
            return step(x, m, noise, seeds, None, clip, True)
        # The threshold is a quantile of the whole x0: two passes, the second given x0 as history.
        _, x0 = step(x, m, None, None, None, None, True)
        x0 = self._threshold_sample(x0)
        return step(x, m, noise, seeds, x0, None, False), x0

    def _row_step(self, run, options, x, t, timestep):
        """(x, m, noise, seeds, history, clip, return_x0) -> x' or (x', x0), of the row of t, or of
        a timestep that only the device knows."""
        where = options, x.device, x.dtype, self._table_weights
        if t is not None:
            row = run.row(t, *where)

            def step(x, m, noise, seeds, history, clip, return_x0):
                slots = [] if history is None else [history]
                made = step_of_row(x, m, row, t + 1, noise, seeds, slots, clip, return_x0)
                return made if return_x0 else made[0]

            return step
        table, steps = run.table(*where), run.steps(x.device)
        index = timestep.reshape(()).to(x.device, torch.int64)

        def step(x, m, noise, seeds, history, clip, return_x0):
            tensors = x, m, table, steps, index, noise, seeds, history
            return sampler_step(*tensors, clip=clip, return_x0=return_x0)

        return step

    def _table_weights(self, run, *options) -> np.ndarray:
        rows = self._weights(run, *options)
        if self.config.thresholding:
            rows[:, AH], rows[:, A0] = rows[:, A0].copy(), 0
        return rows


def _is_timestep(timestep) -> bool:
    if isinstance(timestep, Tensor):
        return timestep.numel() == 1 and timestep.dtype in INTEGERS
    return hasattr(timestep, "__index__")
