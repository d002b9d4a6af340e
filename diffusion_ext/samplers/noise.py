"""Where a step's noise comes from: the caller's tensor or generator, or seeds for the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import as_seeds


def resolve_noise(x: Tensor, noise, seeds) -> tuple[Tensor | None, Tensor | None]:
    """(noise, None) or (None, seeds [B]) for samples x [B, *].

    A generator is drawn from at once. With neither, seeds are drawn from torch's default generator,
    so that torch.manual_seed governs the noise as it does torch.randn.
    """
    if noise is not None and seeds is not None:
        raise ValueError("noise, seeds: wanted one of them, got both")
    if isinstance(noise, torch.Generator):
        noise = torch.randn(x.shape, generator=noise, dtype=x.dtype, device=noise.device)
        return noise.to(x.device), None
    if noise is not None:
        return noise, None
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (x.shape[0],), device=x.device)
    return None, as_seeds(seeds, x.shape[0], x.device)
