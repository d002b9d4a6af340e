"""add_noise and get_velocity of the diffusers schedulers that have ᾱ, as one kernel each.

Methods: a class takes what diffusers' class has.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...ops.perturb import LEARNED, perturb_by_table
from .fused_scheduler import alike
from .rows import root

__all__ = ["INTEGERS", "add_noise", "get_velocity"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """√ᾱ_t x0 + √(1-ᾱ_t) ε, as diffusers' add_noise, with ᾱ in float32 for every dtype.

    Args: original_samples, noise: [B, *]; timesteps: integers [B], [1] or [].
    Returns: [B, *]. Raises: what diffusers raises.
    """
    fused = _perturb(self, original_samples, noise, timesteps, "noise")
    if fused is not None:
        return fused[0]
    x, z, dtype = _widened(original_samples, noise)
    return self.theirs.add_noise(self, x, z, timesteps).to(dtype)


def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """√ᾱ_t ε - √(1-ᾱ_t) x0, as diffusers' get_velocity, with ᾱ in float32 for every dtype.

    Args: sample, noise: [B, *]; timesteps: integers [B], [1] or [].
    Returns: [B, *]. Raises: what diffusers raises.
    """
    fused = _perturb(self, sample, noise, timesteps, "v")
    if fused is not None:
        return fused[1]
    x, z, dtype = _widened(sample, noise)
    return self.theirs.get_velocity(self, x, z, timesteps).to(dtype)


def _perturb(self, x, noise, timesteps, learned: str):
    """(x_t, v) of the op; None for what diffusers has to broadcast or to refuse."""
    if not alike(x, noise) or timesteps.dtype not in INTEGERS:
        return None
    run, batch = self._current_run(), x.shape[0]
    if timesteps.numel() not in (1, batch) or not _within(timesteps, len(run.alpha_bar)):
        return None
    dtype = torch.promote_types(x.dtype, noise.dtype)
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # diffusers takes the roots in float64 for float64 samples, and for those alone.
    alpha_bar = run.alpha_bar.astype(np.float64) if dtype == torch.float64 else run.alpha_bar
    signal, sigma = (
        run.tensor(name, x.device, table_dtype, values)
        for name, values in (
            ("signal", lambda: root(alpha_bar)),
            ("sigma", lambda: root(1 - alpha_bar)),
        )
    )
    t = timesteps.to(x.device, torch.int64).flatten().expand(batch).contiguous()
    return perturb_by_table(x.to(dtype), t, signal, sigma, noise.to(dtype), None, LEARNED[learned])


def _within(timesteps: Tensor, count: int) -> bool:
    """0 <= timesteps < count, where the host can see them; the kernel traps where it cannot."""
    if timesteps.device.type != "cpu" or timesteps.numel() == 0:
        return True
    least, most = timesteps.aminmax()
    return bool(least >= 0 and most < count)


def _widened(x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in at least float32, for diffusers to compute in, and the dtype of the result."""
    dtype = torch.promote_types(x.dtype, noise.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x.to(wide), noise.to(wide), dtype
