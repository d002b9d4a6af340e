"""Models of other libraries as `sample` and Trainer call them: model(x [B,C,H,W], t [B] in (0,1],
context)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_at_least_1, check_in_range, kind, networks_of, shown
from ..nn.context_unet import UnetForward
from ..nn.labels import are_labels
from ..ops.wide import wide, wide_device
from ..samplers import NoiseSchedule
from ..samplers.schedules import check_schedule

__all__ = ["from_denoiser", "from_diffusers", "from_guided_diffusion"]


def from_diffusers(
    model: Callable[..., Any], timesteps: int = 1000, classes: int | None = None
) -> DiffusersModel:
    """A diffusers model: model(x, timestep, ...).sample, timesteps counted from 0 to T-1.

    Args:
        model: UNet2DModel, UNet2DConditionModel or like them. A context that is a dict is its
            keyword arguments (encoder_hidden_states, class_labels, ...); a tensor is
            encoder_hidden_states.
        timesteps: T of the schedule that it was trained with.
        classes: of a network with class embeddings (num_class_embeds = classes + 1): a context
            tensor is then labels, int64 [B], or one-hot [B, classes]; zeros, which guidance and
            training without context use, are the label `classes`.

    Returns: a module, which Trainer trains and whose parameters are model's. Between timesteps
    (spacing="karras") the model is given a fraction. Where it predicts a variance too, its output
    is cut to the mean's channels. Raises: TypeError, ValueError.
    """
    _check_model("model", model)
    check_at_least_1("timesteps", timesteps)
    if classes is not None:
        check_at_least_1("classes", classes)
    return DiffusersModel(model, timesteps, classes)


def from_guided_diffusion(model: Callable[..., Any], timesteps: int = 1000) -> GuidedDiffusionModel:
    """A model(x, t, **context) of integer timesteps from 0. Where its output is [B, 2C, H, W], mean
    and variance, the mean is kept: the table has its own variance.

    Args: context: a dict of keyword arguments (y=labels), or None. timesteps: T of its schedule.
    Returns: a module, as `from_diffusers`. Raises: TypeError, ValueError.
    """
    _check_model("model", model)
    check_at_least_1("timesteps", timesteps)
    return GuidedDiffusionModel(model, timesteps)


def from_denoiser(denoiser: Callable[..., Any], schedule: NoiseSchedule) -> Denoiser:
    """A k-diffusion style denoiser(x, sigma, **context) of x0 + sigma·ε, which returns x0.

    Make the table with prediction="x0". schedule: a NoiseSchedule, which gives sigma/signal at t;
    between timesteps log sigma is interpolated.
    Returns: a module, as `from_diffusers`. Raises: TypeError.
    """
    _check_model("denoiser", denoiser)
    check_schedule(schedule)
    return Denoiser(denoiser, schedule)


class DiffusersModel(nn.Module):
    """See `from_diffusers`."""

    def __init__(self, model: Callable[..., Any], timesteps: int, classes: int | None = None):
        super().__init__()
        self.model, self.timesteps, self.classes = model, timesteps, classes
        self.n_cfeat = classes  # as a ContextUnet has it, whose contexts are labels too

    def forward(self, x: Tensor, t: Tensor, context=None) -> Tensor:
        options = {name: v for name, v in self._options(x, context).items() if v is not None}
        return _mean(self.model(x, _steps(t, self.timesteps), **options).sample, x)

    def _options(self, x: Tensor, context) -> Mapping:
        if isinstance(context, Mapping):
            return context
        if are_labels(context):
            return {"class_labels": self._checked(context)}
        if self.classes is None:
            return {"encoder_hidden_states": context}
        if context is None:
            context = x.new_zeros(len(x), self.classes)
        none = torch.full_like(context[:, :1], 0.5)  # larger than the zeros of no class
        return {"class_labels": torch.cat([context, none], dim=1).argmax(1)}

    def _checked(self, labels: Tensor) -> Tensor:
        if self.classes is None:
            raise TypeError(
                "context: wanted encoder_hidden_states, floats [B, L, n], or a dict, got labels, "
                "which want from_diffusers(model, classes=...)"
            )
        check_in_range("context", labels, 0, self.classes - 1)
        return labels


class GuidedDiffusionModel(nn.Module):
    """See `from_guided_diffusion`."""

    def __init__(self, model: Callable[..., Any], timesteps: int):
        super().__init__()
        self.model, self.timesteps = model, timesteps

    def forward(self, x: Tensor, t: Tensor, context: Mapping | None = None) -> Tensor:
        return _mean(self.model(x, _steps(t, self.timesteps), **_options(context)), x)


class Denoiser(nn.Module):
    """See `from_denoiser`."""

    def __init__(self, denoiser: Callable[..., Any], schedule: NoiseSchedule):
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x: Tensor, t: Tensor, context: Mapping | None = None) -> Tensor:
        # No buffer, which .half() would round. The schedule copies it to a device once: a copy
        # waits for a GPU, and no CUDA graph may have one.
        known = self.schedule.tensor("log_level", wide_device(t.device), torch.float64)
        last = self.schedule.timesteps
        position = (wide(t) * last).clamp(1, last)
        low = position.floor().long()
        share = position - low
        high = (low + 1).clamp(max=last)
        sigma = torch.lerp(known[low], known[high], share).exp()
        scale = (1 + sigma**2).sqrt().to(x.device, x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return self.denoiser(x * scale, sigma.to(x.device, x.dtype), **_options(context))


def _check_model(name: str, model) -> None:
    pipeline = networks_of(model)
    if pipeline or not callable(model) or isinstance(model, type):
        raise TypeError(f"{name}: wanted a module or another callable, got {kind(model)}{pipeline}")
    if isinstance(model, (UnetForward, DiffusersModel, GuidedDiffusionModel, Denoiser)):
        raise TypeError(
            f"{name}: wanted a model of another library, got {kind(model)}, which sample takes as "
            "it is"
        )


def _options(context: Mapping | None) -> Mapping:
    if context is not None and not isinstance(context, Mapping):
        raise TypeError(
            "context: wanted a dict of the model's keyword arguments, such as {'y': labels}, or "
            f"None, got {shown(context)}"
        )
    return context or {}


def _steps(t: Tensor, timesteps: int) -> Tensor:
    """t/T, T counting from 1, as a library counts that calls the first timestep 0."""
    steps = t * timesteps - 1
    nearest = steps.round()
    return torch.where((steps - nearest).abs() < 1e-3, nearest, steps)


def _mean(output: Tensor, x: Tensor) -> Tensor:
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] else output
