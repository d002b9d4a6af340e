"""The sampling loop: a model, a table of steps, and one fused kernel call per step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..checks import Device, as_seeds
from ..samplers import StepTable
from .auto import Way, fastest
from .conditioning import as_context, doubled
from .engines import ENGINES, check_engine
from .engines import start as start_run
from .evaluation import evaluation
from .frames import Frames
from .inputs import as_known, check_options, check_shape, initial, memory_format_of, placement
from .stepping import NoiseSource, draws, is_guided

__all__ = ["ENGINES", "SampleResult", "sample"]


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        images: [B, C, H, W], the samples at timestep 0, on the model's device.
        frames: [F, B, C, H, W] on the CPU, the samples kept on the way (F = 0 without save_rate).
        frame_timesteps: int64 [F], the timestep whose step produced each frame.
        engine: what ran the steps; of engine="auto" the way that was taken, such as "optimized".
    """

    images: Tensor
    frames: Tensor
    frame_timesteps: np.ndarray
    engine: str = "eager"


def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    table: StepTable,
    context: Any = None,
    guidance_scale: float = 1.0,
    seeds: int | Tensor = 0,
    x_T: Tensor | None = None,
    noise: Callable[[int, int], Tensor] | torch.Generator | None = None,
    save_rate: int | None = None,
    engine: str = "eager",
    progress: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    device: Device | None = None,
    dtype: torch.dtype | None = None,
    null_context: Any = None,
    start: Tensor | None = None,
    first_step: int = 0,
    mask: Tensor | None = None,
    differentiable: bool = False,
) -> SampleResult:
    """Draw samples: run the model and the table's steps from noise to images.

    Each step is one kernel, which updates the sample in place. A sample depends on its own seed
    alone, whatever the batch it is drawn in. Samples are channels_last if x_T is, or if the model's
    weights are.

    A ContextUnet without hooks embeds the times and the context of the whole run at once, which
    may change the last bits of its outputs.

    Args:
        model: model(x [B,C,H,W], t [B] = table.times[i], c [B,n] or None) -> [B,C,H,W]. x and t are
            the loop's own buffers: clone what you keep. A module is in evaluation mode for the run.
        shape: (B, C, H, W).
        table: the sampler, from `ddim`, `dpmpp_2m`, `unipc` or another. Each of its rows is a call
            of the model, and a step below: some samplers have two to a step of theirs.
        context: [B, n] floats; int64 labels [B], which become one-hot of model.n_cfeat; or a dict,
            tuple or list of tensors [B, ...], handed to the model as it is.
        guidance_scale: w of classifier-free guidance, m = m_0 + w·(m_c - m_0) (Ho & Salimans 2022),
            m_0 with null_context; both run as one doubled batch. 1 is no guidance, or that of a
            table's own scales (`guided`).
        seeds: an int (sample b gets seeds + b) or int64 [B].
        x_T: [B,C,H,W], the noise to start from, in place of the seeds' own.
        noise: noise(step_index, timestep) -> [B,C,H,W] in place of the kernel's; it is not called
            for steps that add none. Or a torch.Generator, which then draws x_T too.
        save_rate: keep a frame after the first step and those at t < 8 and multiples of save_rate;
            None keeps none.
        engine: what runs the model (docs/engines.md).
            "eager": the model as it is.
            "compile": under torch.compile; the same outputs, to rounding.
            "graph": model and step in one CUDA graph, captured once and replayed, with the bits of
            "eager". It needs a GPU, the kernel's noise, and a model whose Python runs only once.
            "trace": the operators of one call, run without the Python around them, with the bits of
            the model's calls.
            "onnxruntime", "openvino": the exported module, on a CPU in float32.
            "auto": the fastest of these and of a faster copy of the model. The first run measures
            (10 to 30 seconds) and keeps the choice in a file, which `info` shows.
            A trace, an export or a copy is made anew when the weights have changed; it does not
            notice other changes in the module.
        progress: show a progress bar, on a terminal.
        callback: callback(step_index, timestep, x) after each step; x is the live sample.
        device, dtype: of the samples; by default those of the model's parameters. Of a model
            without any: where x_T is, else torch's default device, and float32.
        null_context: what guidance sees in the context's place, of its structure; None is zeros.
        start: [B,C,H,W], an image to start from, noised to where the table is before first_step
            (image to image): first_step 0 leaves almost none of it, the last one nearly all. The
            sampler begins there, with nothing remembered.
        mask: [B or 1, C or 1, H, W], 1 where the image is drawn anew and 0 where start is kept,
            noised like the sample after each step (inpainting).
        differentiable: gradients flow through every step to x_T, the context, start and the model's
            parameters; every step's sample is then kept.

    Returns: SampleResult. Raises: TypeError, ValueError; RuntimeError where an engine cannot
    capture or export the model; ImportError where it is not installed.
    """
    check_options(
        model, table, save_rate, guidance_scale, noise, first_step, callback,
        differentiable=differentiable, progress=progress,
    )  # fmt: skip
    shape = check_shape(model, shape)
    device, dtype = placement(model, x_T, device, dtype)
    check_engine(engine, model, device, dtype, noise, differentiable)
    if isinstance(noise, torch.Generator):
        noise = draws(noise, shape, dtype, device)
        x_T = noise() if x_T is None else x_T
    seeds = as_seeds(seeds, shape[0], device)
    context = as_context(model, context, shape, device, dtype)
    null_context = as_context(model, null_context, shape, device, dtype, "null_context")
    table = table.starting_at(first_step)
    if is_guided(table, guidance_scale):
        if context is None:
            scale = guidance_scale if table.guidance is None else "a guided table"
            raise ValueError(f"guidance_scale: {scale} wants a context, got context=None")
        context = doubled(context, null_context)

    grad = contextlib.nullcontext() if differentiable else torch.no_grad()
    with grad, evaluation(model):
        x = initial(x_T, shape, seeds, dtype, device)
        known = as_known(start, mask, first_step, x, table)
        first = x if known is None else known.before(first_step)

        def begin(way: Way, noise=noise):
            return start_run(
                way.engine, way.of(model), table, first, context, NoiseSource(table, seeds, noise),
                guidance_scale, way.memory_format or memory_format_of(model, x_T, shape), known,
                first_step, differentiable,
            )  # fmt: skip

        way = Way("eager" if differentiable and engine == "auto" else engine)
        if way.engine == "auto":
            rows = range(first_step, len(table))
            trial = partial(begin, noise=None)  # the caller's noise is for the run
            way = fastest(model, x, context, trial, rows, noise is None, progress)
        stepper = begin(way)
        timesteps = table.timesteps.tolist()
        frames = Frames(timesteps, first_step, save_rate, stepper.x)
        # None: tqdm hides itself where there is no terminal.
        bar = tqdm(
            timesteps[first_step:],
            desc="sampling",
            unit="step",
            disable=None if progress else True,
        )
        for i, timestep in enumerate(bar, first_step):
            stepper.advance(i)
            frames.keep(i, stepper.x)
            if callback is not None:
                callback(i, timestep, stepper.x)
        return SampleResult(stepper.result(), *frames.result(), way.name)
