"""The sampling loop: a model, a table of steps, and one fused kernel call per step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checks import FLOATING, as_seeds, check_number, check_sizes
from .conditioning import as_context, doubled
from .ops import philox_normal
from .samplers import StepTable
from .stepping import DifferentiableStepper, InPlaceStepper, Known, draws

__all__ = ["SampleResult", "sample"]

ENGINES = ("eager",)


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        images: [B, C, H, W], the samples at timestep 0, on the model's device.
        frames: [F, B, C, H, W] on the CPU, the samples kept on the way (F = 0 without save_rate).
        frame_timesteps: int64 [F], the timestep whose step produced each frame.
    """

    images: Tensor
    frames: Tensor
    frame_timesteps: np.ndarray


def sample(
    model: Callable,
    shape,
    table: StepTable,
    context=None,
    guidance_scale: float = 1.0,
    seeds: int | Tensor = 0,
    x_T: Tensor | None = None,
    noise: Callable[[int, int], Tensor] | torch.Generator | None = None,
    save_rate: int | None = None,
    engine: str = "eager",
    progress: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    device=None,
    dtype: torch.dtype | None = None,
    null_context=None,
    start: Tensor | None = None,
    first_step: int = 0,
    mask: Tensor | None = None,
    differentiable: bool = False,
) -> SampleResult:
    """Draw samples: run the model and the table's steps from noise to images.

    The sample is updated in place; with the kernels, the loop itself allocates nothing where the
    model's output lies in memory as its input does (channels_last if x_T is, or the model's
    weights are). A sample depends on its own seed alone, whatever the batch it is drawn in.

    Args:
        model: model(x [B,C,H,W], t [B] = table.times[i], c [B,n] or None) -> [B,C,H,W]. x and t are
            the loop's own buffers: clone what you keep. A module is in evaluation mode for the run.
        shape: (B, C, H, W).
        table: the sampler, from `ddpm`, `ddim`, `dpmpp_2m`, `flow_euler` or another.
        context: [B, n] floats; int64 labels [B], which become one-hot of model.n_cfeat; or a dict,
            tuple or list of tensors [B, ...], handed to the model as it is.
        guidance_scale: w of classifier-free guidance, m = m_0 + w·(m_c - m_0) (Ho & Salimans 2022),
            m_0 with null_context; both run as one doubled batch. 1 is no guidance.
        seeds: an int (sample b gets seeds + b) or int64 [B].
        x_T: [B,C,H,W], the noise to start from, in place of the seeds' own.
        noise: noise(step_index, timestep) -> [B,C,H,W] in place of the kernel's; it is not called
            for steps that add none. Or a torch.Generator, which then draws x_T too.
        save_rate: keep a frame after the first step and those at t < 8 and multiples of save_rate;
            None keeps none.
        engine: "eager".
        progress: show a progress bar, on a terminal.
        callback: callback(step_index, timestep, x) after each step; x is the live sample.
        device, dtype: of the samples; by default those of the model's parameters, else the CPU and
            float32.
        null_context: what guidance sees in the context's place, of its structure; None is zeros.
        start: [B,C,H,W], an image to start from, noised to where the table is before first_step
            (image to image): first_step 0 leaves almost none of it, the last one nearly all.
        mask: [B or 1, C or 1, H, W], 1 where the image is drawn anew and 0 where start is kept,
            noised like the sample after each step (inpainting).
        differentiable: gradients flow through every step to x_T, the context, start and the model's
            parameters; every step's sample is then kept.

    Returns: SampleResult. Raises: TypeError, ValueError.
    """
    shape = check_sizes(shape, "(B, C, H, W)")
    _check_options(table, engine, save_rate, guidance_scale, noise)
    device, dtype = _placement(model, device, dtype)
    if isinstance(noise, torch.Generator):
        noise = draws(noise, shape, dtype, device)
        x_T = noise() if x_T is None else x_T
    seeds = as_seeds(seeds, shape[0], device)
    context = as_context(model, context, shape[0], device, dtype)
    null_context = as_context(model, null_context, shape[0], device, dtype, "null_context")
    if guidance_scale != 1 and context is None:
        raise ValueError(f"guidance_scale: {guidance_scale} wants a context, got context=None")

    if guidance_scale != 1:
        context = doubled(context, null_context)
    grad = contextlib.nullcontext() if differentiable else torch.no_grad()
    with grad, _evaluation(model):
        x = _initial(x_T, shape, seeds, dtype, device)
        known = _known(start, mask, first_step, x, table)
        x = x if known is None else known.at(first_step)
        arguments = (table, x, seeds, noise, guidance_scale)
        if differentiable:
            stepper = DifferentiableStepper(*arguments)
        else:
            stepper = InPlaceStepper(*arguments, _memory_format(model, x_T, shape))
        frames, frame_timesteps = [], []
        # None: tqdm hides itself where there is no terminal.
        bar = tqdm(
            table.timesteps.tolist()[first_step:],
            desc="sampling",
            unit="step",
            disable=None if progress else True,
        )
        for i, timestep in enumerate(bar, first_step):
            inputs, times = stepper.inputs(i)
            stepper.step(i, _check_output(model(inputs, times, context), inputs))
            if mask is not None:
                stepper.x = _replace(stepper.x, known.keep(i + 1, stepper.x), differentiable)
            if save_rate is not None and (i == first_step or _keeps(timestep, save_rate)):
                frames.append(stepper.x.detach().to("cpu", copy=True))
                frame_timesteps.append(timestep)
            if callback is not None:
                callback(i, timestep, stepper.x)
    kept = torch.stack(frames) if frames else torch.empty((0, *shape), dtype=dtype)
    return SampleResult(stepper.result(), kept, np.array(frame_timesteps, dtype=np.int64))


def _replace(x: Tensor, values: Tensor, differentiable: bool) -> Tensor:
    return values if differentiable else x.copy_(values)


def _known(start, mask, first_step, noise: Tensor, table: StepTable) -> Known | None:
    """The image to start from, checked, in the sample's dtype and device."""
    if not isinstance(first_step, int) or not 0 <= first_step < len(table):
        raise ValueError(f"first_step: wanted from 0 to {len(table) - 1}, got {first_step!r}")
    if start is None:
        if mask is not None or first_step:
            raise ValueError("start: wanted an image for a mask or a first_step, got None")
        return None
    if not isinstance(start, Tensor) or start.shape != noise.shape:
        got = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start: wanted shape {list(noise.shape)}, got {got}")
    if table.levels is None:
        raise ValueError("start: wanted a table that knows its noise levels (StepTable.levels)")
    if mask is not None:
        if not isinstance(mask, Tensor) or not _broadcasts(mask, noise):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: wanted to broadcast to {list(noise.shape)}, got {got}")
        mask = mask.to(noise)
    return Known(start.to(noise), noise, mask, table.levels.tolist())


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    sizes = zip(mask.shape, x.shape, strict=False)
    return mask.dim() == x.dim() and all(m in (1, n) for m, n in sizes)


def _keeps(timestep: int, save_rate: int) -> bool:
    return timestep % save_rate == 0 or timestep < 8


def _check_options(table, engine, save_rate, guidance_scale, noise) -> None:
    if not isinstance(table, StepTable):
        raise TypeError(f"table: wanted a StepTable (from ddim, ddpm), got {type(table).__name__}")
    if engine not in ENGINES:
        raise ValueError(f"engine: wanted one of {ENGINES}, got {engine!r}")
    if save_rate is not None and (not isinstance(save_rate, int) or save_rate < 1):
        raise ValueError(f"save_rate: wanted an int of at least 1 or None, got {save_rate!r}")
    check_number("guidance_scale", guidance_scale)
    if noise is not None and not callable(noise) and not isinstance(noise, torch.Generator):
        raise TypeError(
            f"noise: wanted a callable or a torch.Generator, got {type(noise).__name__}"
        )


def _memory_format(model, x_T, shape) -> torch.memory_format:
    """channels_last for images where x_T is, or a convolution's weights are."""
    tensors = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    tensors += [x_T] if isinstance(x_T, Tensor) else []

    def is_channels_last(t: Tensor) -> bool:
        turned = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
        return turned and not t.is_contiguous()

    if len(shape) == 4 and any(is_channels_last(t) for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def _placement(model, device, dtype) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if device is None:
        device = "cpu" if parameter is None else parameter.device
    if dtype is None:
        dtype = torch.float32 if parameter is None else parameter.dtype
    if dtype not in FLOATING:
        raise TypeError(f"dtype: wanted float16, bfloat16, float32 or float64, got {dtype}")
    return torch.device(device), dtype


def _initial(x_T, shape, seeds: Tensor, dtype, device) -> Tensor:
    """x_T [B,C,H,W]: the caller's, or normals of stream 0."""
    if x_T is None:
        return philox_normal(seeds, shape, step=0, stream=0, dtype=dtype)
    if not isinstance(x_T, Tensor):
        raise TypeError(f"x_T: wanted a tensor or None, got {type(x_T).__name__}")
    if x_T.shape != shape:
        raise ValueError(f"x_T: wanted shape {list(shape)}, got {list(x_T.shape)}")
    return x_T.to(device, dtype)


def _check_output(output, inputs: Tensor) -> Tensor:
    """The model's output in the sample's dtype; autocast models give half precision."""
    if not isinstance(output, Tensor) or output.shape != inputs.shape:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: wanted an output of shape {list(inputs.shape)}, got {got}")
    return output if output.dtype == inputs.dtype else output.to(inputs.dtype)


@contextlib.contextmanager
def _evaluation(model):
    """A module in evaluation mode, as it was afterwards."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
