"""The sampling loop: a model, a table of steps, and one fused kernel call per step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .checks import FLOATING, as_seeds, check_like, check_number, check_sizes
from .conditioning import as_context, doubled
from .ops import backend, philox_normal, reference
from .samplers import COLUMNS, StepTable

__all__ = ["SampleResult", "sample"]

AZ = COLUMNS.index("az")
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
) -> SampleResult:
    """Draw samples: run the model and the table's steps from noise to images, without gradients.

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

    Returns: SampleResult. Raises: TypeError, ValueError.
    """
    shape = check_sizes(shape, "(B, C, H, W)")
    _check_options(table, engine, save_rate, guidance_scale, noise)
    device, dtype = _placement(model, device, dtype)
    if isinstance(noise, torch.Generator):
        noise = _draws(noise, shape, dtype, device)
        x_T = noise() if x_T is None else x_T
    seeds = as_seeds(seeds, shape[0], device)
    context = as_context(model, context, shape[0], device, dtype)
    null_context = as_context(model, null_context, shape[0], device, dtype, "null_context")
    if guidance_scale != 1 and context is None:
        raise ValueError(f"guidance_scale: {guidance_scale} wants a context, got context=None")

    guided = guidance_scale != 1
    halves = 2 if guided else 1
    inputs = torch.empty(
        (halves * shape[0], *shape[1:]),
        dtype=dtype,
        device=device,
        memory_format=_memory_format(model, x_T, shape),
    )
    # [B,C,H,W], updated in place; under guidance the first half of the inputs copies it.
    x = inputs[len(inputs) - shape[0] :]
    with torch.no_grad():
        x.copy_(_initial(x_T, shape, seeds, dtype, device))
    if guided:
        context = doubled(context, null_context)
    step = _Stepper(table, x, seeds, noise, guidance_scale)
    frames, frame_timesteps = [], []

    hidden = None if progress else True  # None: tqdm hides itself where there is no terminal
    bar = tqdm(table.timesteps.tolist(), desc="sampling", unit="step", disable=hidden)
    with torch.no_grad(), _evaluation(model):
        # Half precision cannot tell one timestep of a thousand from the next.
        times = torch.empty(
            len(inputs), dtype=torch.promote_types(dtype, torch.float32), device=device
        )
        for i, timestep in enumerate(bar):
            if guided:
                inputs[: shape[0]].copy_(x)
            output = model(inputs, times.fill_(float(table.times[i])), context)
            step(i, _check_output(output, inputs))
            if save_rate is not None and (i == 0 or _keeps(timestep, save_rate)):
                frames.append(x.to("cpu", copy=True))
                frame_timesteps.append(timestep)
            if callback is not None:
                callback(i, timestep, x)
    kept = torch.stack(frames) if frames else torch.empty((0, *shape), dtype=dtype)
    return SampleResult(x.clone() if guided else x, kept, np.array(frame_timesteps, dtype=np.int64))


class _Stepper:
    """Applies row i of a table to x [B,*] in place; what can be checked and made once is."""

    def __init__(self, table: StepTable, x: Tensor, seeds: Tensor, noise, guidance: float):
        self.table, self.x, self.seeds, self.noise, self.guidance = table, x, seeds, noise, guidance
        self.coefficients, self.timesteps = table.tensors(x.device, x.dtype)
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.native = backend.serves(x)
        self.history = torch.zeros_like(x) if table.multistep else None  # x0 of the step before

    def __call__(self, i: int, output: Tensor) -> None:
        noise = seeds = None
        if self.table.weights[i, AZ] != 0:
            noise, seeds = self._noise(i)
        args = (self.coefficients, self.timesteps, self.rows[i], noise, seeds)
        args += (self.history, self.table.clip, self.guidance)
        if self.native:
            backend.kernels().sampler_step_(self.x, output, *args)
            return
        x, x0 = reference.sampler_step(self.x, output, *args)
        self.x.copy_(x)
        if self.history is not None:
            self.history.copy_(x0)

    def _noise(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        if self.noise is None:
            return None, self.seeds
        noise = self.noise(i, int(self.table.timesteps[i]))
        check_like("noise", noise, "x", self.x)
        return noise, None


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


def _draws(generator: torch.Generator, shape, dtype, device) -> Callable[..., Tensor]:
    def draw(*_) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        return noise.to(device)

    return draw


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
