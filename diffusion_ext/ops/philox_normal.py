"""philox_normal: normal noise as a function of (seed, step, stream, element)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import Device, as_device, as_seeds, check_dtype, check_int, check_sizes
from . import reference
from .backend import kernels, register_fake, serves


def philox_normal(
    seeds: int | Tensor,
    shape: Sequence[int],
    step: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: Device | None = None,
) -> Tensor:
    """Standard normals that depend on each sample's seed alone, not on the batch or the device.

    Philox4x32-10 (Salmon et al. 2011) and Box-Muller; element e of a sample, counted in (C, H, W)
    order, comes from counter (e // 4, step, stream) under the sample's seed.

    Args:
        seeds: int64 [B], or an int: sample b gets seeds + b.
        shape: (B, *), the result's shape.
        step, stream: counter words, 0 to 2^32 - 1. Stream 0 is initial latents, 1 sampler noise,
            2 training noise.
        dtype: float16, bfloat16, float32 or float64.
        device: where the result lies; by default the seeds' device (the CPU for an int).

    Returns: [B, *] of `dtype`, contiguous. Raises: TypeError, ValueError for bad arguments.
    """
    shape = check_sizes(shape, "(B, *)")
    check_dtype(dtype)
    for name, word in (("step", step), ("stream", stream)):
        check_int(name, word)
        if not 0 <= word < 2**32:
            raise ValueError(f"{name}: wanted from 0 to 2^32 - 1, got {word}")
    if device is None:
        device = seeds.device if isinstance(seeds, Tensor) else "cpu"
    seeds = as_seeds(seeds, shape[0], as_device(device))
    out = torch.empty(shape, dtype=dtype, device=seeds.device)
    if not serves(out):
        return reference.philox_normal(seeds, shape, step, stream, dtype)
    kernels().philox_normal_(out, seeds, int(step), int(stream))
    return out


@register_fake("philox_normal_")
def _(out, seeds, step, stream):
    return None
