"""Samplers as tables: a sampler is a pure function from a schedule to one row of numbers per step.

Every step of every sampler here is the same arithmetic (x [B,*] the sample, m the model's output,
z normal noise, h the data prediction of the step before):

    x0 = clip(kx·x + km·m)
    x' = ax·x + am·m + a0·x0 + ah·h + az·z

so adding a sampler is writing the weights of x, x0, ε, h and z in x', from its paper, and nothing
else. The weights are computed in float64; the kernels read them as float32, whatever the sample's
dtype (in half precision the noise of the last steps would vanish).
"""

from __future__ import annotations

import numpy as np

from ..checks import check_clip
from ..ops.sampler_step import COLUMNS
from .grids import Grid
from .step_table import StepTable

PREDICTIONS = ("epsilon", "v", "x0", "flow")


def table_of(
    grid: Grid, *, x=0.0, x0=0.0, eps=0.0, before=0.0, z=0.0, clip, prediction
) -> StepTable:
    """Rows from the weights in x' (float64 [n] each) of x, x0, ε, the x0 before, and z."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: wanted one of {PREDICTIONS}, got {prediction!r}")
    check_clip(clip)
    signal, sigma = grid.signal, grid.sigma
    if prediction == "epsilon" and (signal == 0).any():
        raise ValueError(
            f"prediction: 'epsilon' cannot give x0 at t = {grid.timesteps[signal == 0][0]}, where "
            "alpha_bar is 0 (zero terminal SNR); wanted a model that predicts 'v' or 'x0'"
        )
    kx, km, ex, em = predictions(signal, sigma, prediction)
    # Where x0 is beyond float32 it is not to be had; finite weights keep 0·x0 from being NaN.
    kx, km = np.clip(kx, -1e30, 1e30), np.clip(km, -1e30, 1e30)
    if clip is None:  # x0 is linear in x and m: fold it, so that the kernel reads two weights
        ax, am, a0 = x + x0 * kx + eps * ex, x0 * km + eps * em, 0.0
    else:  # ε is what the clipped x0 leaves of x, so that the two still make up x
        ax, am, a0 = x + eps / sigma, 0.0, x0 - eps * signal / sigma
    columns = {"kx": kx, "km": km, "ax": ax, "am": am, "a0": a0, "ah": before, "az": z}
    weights = np.stack([np.broadcast_to(columns[n], len(grid)) for n in COLUMNS], axis=1)
    levels = [np.append(signal, grid.next_signal[-1]), np.append(sigma, grid.next_sigma[-1])]
    times, levels = grid.times, np.stack(levels, axis=1)
    return StepTable(grid.timesteps, weights, clip, grid.train_timesteps, times, levels)


def predictions(signal: np.ndarray, sigma: np.ndarray, prediction: str):
    """(kx, km, ex, em), float64 [n] each: x0 = kx·x + km·m and ε = ex·x + em·m.

    x = signal·x0 + sigma·ε; v = signal·ε - sigma·x0 (Salimans & Ho 2022, appendix D); the velocity
    of rectified flow is ε - x0.
    """
    zero, one = np.zeros_like(signal), np.ones_like(signal)
    if prediction == "epsilon":
        return 1 / signal, -sigma / signal, zero, one
    if prediction == "v":
        return signal, -sigma, sigma, signal
    if prediction == "flow":
        both = signal + sigma
        return 1 / both, -sigma / both, 1 / both, signal / both
    return zero, one, 1 / sigma, -signal / sigma
