"""What holds the samplers to others' code: one model, one noise, float64, step by step."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import Tensor

import diffusion_ext as dx
from diffusion_ext.ops import reference

SCHEDULE = dx.NoiseSchedule.scaled_linear(1000)
SHAPE = (2, 3, 4, 4)


def draw(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def noise(i: int) -> Tensor:
    """The noise of row i."""
    return draw(1000 + i)


def denoised(y: Tensor, r: float) -> Tensor:
    """A model's x0 of y = x/signal = x0 + r·ε: no straight line in y, r or log r."""
    wide = (1 + r * r) ** 0.5
    return torch.tanh(1.3 * y / wide + 0.4 / wide) + 0.2 * torch.sin(2.0 * y / wide)


def run(table: dx.StepTable, y: Tensor, predict=denoised) -> list[Tensor]:
    """The samples x/signal [n+1] of a run of a table for a model of x0, from y on."""
    levels = table.levels
    x = y * levels[0, 0]
    tensors, slots = table.tensors("cpu", torch.float64), table.new_slots(x)
    samples = [y]
    for i in range(len(table)):
        signal, sigma = levels[i].tolist()
        m = predict(x / signal, sigma / signal)
        arguments = (noise(i) if table.noisy[i] else None, None, slots, table.clip, 1.0)
        x, _, slots = reference.sampler_step_with_slots(x, m, *tensors, torch.tensor(i), *arguments)
        samples.append(x / levels[i + 1, 0])
    return samples


def ratios(table: dx.StepTable) -> Tensor:
    """sigma/signal, float64 [n+1], of a table's levels: what k-diffusion and diffusers call σ."""
    return torch.from_numpy(table.levels[:, 1] / table.levels[:, 0])


def k_diffusion():
    """k-diffusion's module of samplers, without the rest, which wants torchvision and more."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    for name in ("k_diffusion", "torchdiffeq", "torchsde", "scipy"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    (folder,) = importlib.util.find_spec("k_diffusion").submodule_search_locations
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__, package.utils = [folder], utils
    utils.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
    return importlib.import_module("k_diffusion.sampling")
