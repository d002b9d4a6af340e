"""perturb: forward noising on a schedule, x0 to (x_t, training target)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_timestep, check_like, check_sample
from ..ops.perturb import perturb_by_table
from .noise import resolve_noise
from .schedules import NoiseSchedule, check_schedule

TARGETS = ("noise", "v")
NOISINGS = {"standard": "sigma", "course": "variance"}


def perturb(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
    target: str = "noise",
    noising: str = "standard",
) -> tuple[Tensor, Tensor]:
    """Noise clean samples to timestep t: x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε (Ho et al. 2020, eq. 4).

    Args:
        x0: [B, *], clean samples; any floating dtype, memory format and strides.
        t: from 0 to T: integers [B], or one for all samples.
        schedule: the noise schedule.
        noise: ε [B, *] in x0's dtype, or a torch.Generator to draw it from.
        seeds: int64 [B] or an int (sample b gets seeds + b): ε is made in the kernel, stream 2.
            With neither noise nor seeds, the seeds come from torch's default generator.
        target: what a model learns: "noise" (ε) or "v" (√ᾱ ε - √(1-ᾱ) x0, Salimans & Ho 2022).
        noising: "standard", or "course", whose notebook forgot the root: (1-ᾱ_t) ε.

    Returns: (x_t, target), each [B, *], x0's dtype and memory format; the caller's own noise, where
    that is the target, is returned as it came.
    Raises: TypeError, ValueError for bad arguments; t on the host is checked to lie in 0..T.
    """
    check_sample("x0", x0)
    check_schedule(schedule)
    t = as_timestep("t", t, x0, 0, schedule.timesteps)
    if target not in TARGETS:
        raise ValueError(f"target: wanted one of {TARGETS}, got {target!r}")
    if noising not in NOISINGS:
        raise ValueError(f"noising: wanted one of {tuple(NOISINGS)}, got {noising!r}")
    if not isinstance(t, Tensor):
        t = torch.full(x0.shape[:1], t, device=x0.device)
    if t.dim() == 0:
        t = t.expand(x0.shape[:1])
    noise, seeds = resolve_noise(x0, noise, seeds)
    if noise is not None:
        check_like("noise", noise, "x0", x0)
    table_dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    signal, sigma = schedule.constant(_tables, NOISINGS[noising], x0.device, table_dtype)
    x_t, learned = perturb_by_table(x0, t, signal, sigma, noise, seeds, target == "v")
    # The kernel writes no second copy of a noise that the caller holds.
    return x_t, noise if target == "noise" and noise is not None else learned


def _tables(schedule: NoiseSchedule, sigma: str, device, dtype) -> tuple[Tensor, Tensor]:
    return schedule.tensor("signal", device, dtype), schedule.tensor(sigma, device, dtype)
