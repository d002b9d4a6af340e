"""A ContextUnet for `bench`: of random weights, or out of a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...nn import ContextUnet, optimize_for_sampling
from ...ops import use_backend
from ...samplers import NoiseSchedule, StepTable, ddim
from ...sampling import sample
from ...sampling.exports import OfTensors, exported
from ...training import load_trained
from .subject import RANDOM_WEIGHTS, RUNTIMES, Part, Request, Subject, drawn

GUIDANCE = 2.0
SIZE, CLASSES = 16, 10  # of the one with random weights


def context_unet(request: Request, checkpoint: Path | None = None) -> Subject:
    """Guided samples by DDIM. In every way but ours each operator is torch's own."""
    model = _random(request) if checkpoint is None else _trained(request, checkpoint)
    model = model.to(request.device, request.torch_dtype).eval()
    shape = (request.batch, model.in_channels, model.height, model.height)
    doubled = (2 * request.batch, *shape[1:])  # with and without the context
    classes = torch.arange(doubled[0]) % model.n_cfeat
    context = torch.eye(model.n_cfeat)[classes].to(request.device, request.torch_dtype)
    times = torch.linspace(0.1, 1, doubled[0]).to(request.device, request.torch_dtype)
    x, output = drawn(doubled, request), drawn(doubled, request, seed=1)
    start, table = drawn(shape, request, seed=2), ddim(NoiseSchedule.linear(), request.steps)
    if request.way == "ours":
        network = optimize_for_sampling(model, batch=doubled[0])
        run = partial(_fused_run, table, start, output, context[: request.batch])
    else:
        network = _plain(_network(model, request, x, times, context))
        run = partial(_plain_run, table.levels.tolist(), start, output)
    parts = [
        Part("network", request.steps, lambda: network(x, times, context)),
        Part("sampler", request.steps, run, per_call=request.steps),
    ]
    advice = [
        f"fast = dx.optimize_for_sampling(model, batch={doubled[0]})",
        f"table = dx.ddim(schedule, steps={request.steps})",
        f"result = dx.sample(fast, {shape}, table, context, guidance_scale={GUIDANCE})",
    ]
    notes = [RANDOM_WEIGHTS] if checkpoint is None else []
    return Subject(f"ContextUnet, n_feat {model.n_feat}", shape, parts, advice, notes)


def _random(request: Request) -> ContextUnet:
    torch.manual_seed(0)
    return ContextUnet(3, n_feat=64, n_cfeat=CLASSES, height=request.size or SIZE)


def _trained(request: Request, checkpoint: Path) -> ContextUnet:
    model = load_trained(checkpoint).model
    if request.size not in (None, model.height):
        raise ValueError(f"size: wanted {model.height}, the checkpoint's, got {request.size}")
    return model


def _network(model: ContextUnet, request: Request, *inputs: Tensor) -> Callable:
    if request.way == "compile":
        return torch.compile(model)
    if request.way not in RUNTIMES:
        return model
    with use_backend("reference"):
        return exported(request.way, OfTensors(model, *inputs), inputs)


def _plain(model: Callable) -> Callable:
    def call(*inputs: Tensor) -> Tensor:
        with use_backend("reference"):
            return model(*inputs)

    return call


def _fused_run(table: StepTable, start: Tensor, output: Tensor, context: Tensor) -> Tensor:
    """`sample` with a network that costs nothing: its loop, and one kernel a step."""
    result = sample(
        lambda *_: output, start.shape, table, context, GUIDANCE, x_T=start, progress=False
    )
    return result.images


def _plain_run(levels: list[tuple[float, float]], x: Tensor, output: Tensor) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12, η = 0) and guidance (Ho & Salimans 2022) in torch."""
    for (signal, sigma), (next_signal, next_sigma) in itertools.pairwise(levels):
        without, with_context = output.chunk(2)
        eps = without + GUIDANCE * (with_context - without)
        x0 = (x - sigma * eps) / signal
        x = next_signal * x0 + next_sigma * eps
    return x
