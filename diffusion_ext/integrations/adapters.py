"""Models of other libraries as `sample` calls them: model(x [B,C,H,W], t [B] in (0,1], context)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["from_denoiser", "from_diffusers", "from_guided_diffusion"]


def from_diffusers(model: Callable, timesteps: int = 1000) -> Callable:
    """A diffusers model: model(x, timestep, ...).sample, timesteps counted from 0 to T-1.

    Args:
        model: UNet2DModel, UNet2DConditionModel or like them. A context that is a dict is its
            keyword arguments (encoder_hidden_states, class_labels, ...); a tensor is
            encoder_hidden_states.
        timesteps: T of the schedule that it was trained with.

    Between timesteps (spacing="karras") the model is given a fraction. Where it predicts a variance
    too, its output is cut to the mean's channels.
    """

    def call(x: Tensor, t: Tensor, context=None) -> Tensor:
        options = context if isinstance(context, Mapping) else {"encoder_hidden_states": context}
        options = {name: value for name, value in options.items() if value is not None}
        return _mean(model(x, _steps(t, timesteps), **options).sample, x)

    return call


def from_guided_diffusion(model: Callable, timesteps: int = 1000) -> Callable:
    """A model(x, t, **context) of integer timesteps from 0. Where its output is [B, 2C, H, W], mean
    and variance, the mean is kept: the table has its own variance.

    Args: context: a dict of keyword arguments (y=labels), or None. timesteps: T of its schedule.
    """

    def call(x: Tensor, t: Tensor, context: Mapping | None = None) -> Tensor:
        return _mean(model(x, _steps(t, timesteps), **(context or {})), x)

    return call


def from_denoiser(denoiser: Callable, schedule) -> Callable:
    """A k-diffusion style denoiser(x, sigma, **context) of x0 + sigma·ε, which returns x0.

    Its x0 is a model's with prediction="x0": make the table so. schedule: a NoiseSchedule, which
    tells the noise ratio sigma/signal at t; a t between timesteps has log sigma interpolated.
    """
    last = schedule.timesteps
    ratio = torch.as_tensor(schedule.sigma[1:] / schedule.signal[1:]).log()

    def call(x: Tensor, t: Tensor, context: Mapping | None = None) -> Tensor:
        known = ratio.to(t.device)
        position = (t.double() * last - 1).clamp(0, last - 1)
        low = position.floor().long()
        share = position - low
        high = (low + 1).clamp(max=last - 1)
        sigma = torch.lerp(known[low], known[high], share).exp()
        wide = (1 + sigma**2).sqrt().to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return denoiser(x * wide, sigma.to(x.dtype), **(context or {}))

    return call


def _steps(t: Tensor, timesteps: int) -> Tensor:
    """t/T, T counting from 1, as a library counts that calls the first timestep 0."""
    steps = t * timesteps - 1
    nearest = steps.round()
    return torch.where((steps - nearest).abs() < 1e-3, nearest, steps)


def _mean(output: Tensor, x: Tensor) -> Tensor:
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
