"""What runs the steps of `sample`.

eager        the network as it is
compile      the network under torch.compile, the step between its calls
graph        network and step captured once in a CUDA graph, replayed for every step
trace        the operators of the network, written down once, without the Python around them
onnxruntime  the network exported once and run by ONNX Runtime, the step between its calls
openvino     the same by OpenVINO
auto         what is fastest here (auto.py)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..checks import check_choice, kind
from ..samplers import StepTable
from . import graphs
from .exports import WAYS, ExportedNetwork
from .networks import CalledNetwork, PreparedNetwork, prepares
from .runtimes import RUNTIMES, missing
from .stepping import DifferentiableStepper, InPlaceStepper, NoiseSource, is_guided

ENGINES = ("eager", "compile", "graph", *WAYS, "auto")


def check_engine(
    engine, model, device: torch.device, dtype: torch.dtype, noise, differentiable: bool
) -> None:
    check_choice("engine", engine, ENGINES)
    if engine in WAYS and not isinstance(model, nn.Module):
        raise TypeError(f"model: engine {engine!r} wants a torch.nn.Module, got {kind(model)}")
    if engine in RUNTIMES:
        _check_runtime(engine, device, dtype)
    if engine == "graph":
        _check_graph(device, noise)
    if differentiable and engine not in ("eager", "compile", "auto"):
        raise ValueError(
            f"differentiable: engine {engine!r} has no gradients, wanted 'eager' or 'compile'"
        )


def _check_runtime(engine: str, device: torch.device, dtype: torch.dtype) -> None:
    if lacking := missing(engine):
        raise ImportError(f"engine: {engine!r} wants the package {lacking}, which is not installed")
    if (device.type, dtype) != ("cpu", torch.float32):
        raise ValueError(
            f"engine: {engine!r} wants float32 samples on the CPU, got {dtype} on {device}"
        )
    if torch.is_autocast_enabled("cpu"):
        raise ValueError(f"engine: {engine!r} runs in float32, got a region of torch.autocast")


def _check_graph(device: torch.device, noise) -> None:
    if device.type not in graphs.DEVICES:
        raise ValueError(f"engine: 'graph' wants samples on a CUDA device, got {device}")
    if noise is not None:
        raise ValueError(
            f"noise: engine 'graph' makes its own of the seeds, wanted None, got {kind(noise)}"
        )


def start(
    engine: str,
    model: Callable,
    table: StepTable,
    x: torch.Tensor,
    context,
    noise: NoiseSource,
    guidance: float,
    memory_format: torch.memory_format,
    known,
    first_step: int,
    differentiable: bool,
):
    """The stepper of a run; the arguments are as the steppers of stepping.py have them."""
    times, _ = table.run_tensors(x.device, x.dtype)
    batch = (2 if is_guided(table, guidance) else 1) * len(x)
    if engine in WAYS:
        exported = ExportedNetwork(engine, model)
        network = CalledNetwork(exported, times, table.times.tolist(), context, batch)
    elif prepares(model) and not differentiable:
        network = PreparedNetwork(model, times, context)
    else:
        network = CalledNetwork(model, times, table.times.tolist(), context, batch)
    if engine == "compile":
        # torch keeps what it has compiled for as long as the model lives, and finds it again.
        network.call = torch.compile(network.call, dynamic=False)
    if engine in RUNTIMES:
        memory_format = torch.contiguous_format  # as they have images
    run = (network, table, x, noise, guidance)
    if differentiable:
        return DifferentiableStepper(*run, known)
    stepper = InPlaceStepper(*run, memory_format, known, first_step)
    return graphs.GraphStepper(model, stepper) if engine == "graph" else stepper
