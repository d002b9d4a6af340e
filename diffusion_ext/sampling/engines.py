"""What runs the steps of `sample`.

eager    the network as it is
compile  the network under torch.compile, the step between its calls
graph    network and step captured once in a CUDA graph, replayed for every step
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..checks import check_choice
from ..samplers import StepTable
from . import graphs
from .networks import CalledNetwork, PreparedNetwork, prepares
from .stepping import DifferentiableStepper, InPlaceStepper, NoiseSource, is_guided

ENGINES = ("eager", "compile", "graph")


def check_engine(engine, device: torch.device, noise, differentiable: bool) -> None:
    check_choice("engine", engine, ENGINES)
    if engine != "graph":
        return
    if device.type not in graphs.DEVICES:
        raise ValueError(f"engine: 'graph' wants samples on a CUDA device, got {device}")
    if noise is not None:
        raise ValueError(
            f"noise: engine 'graph' makes its own from the seeds, got {type(noise).__name__}"
        )
    if differentiable:
        raise ValueError("differentiable: engine 'graph' has no gradients, got True")


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
    if prepares(model) and not differentiable:
        network = PreparedNetwork(model, times, context, x)
    else:
        network = CalledNetwork(model, times, table.times.tolist(), context, batch)
    if engine == "compile":
        # torch keeps what it has compiled for as long as the model lives, and finds it again.
        network.call = torch.compile(network.call, dynamic=False)
    run = (network, table, x, noise, guidance)
    if differentiable:
        return DifferentiableStepper(*run, known)
    stepper = InPlaceStepper(*run, memory_format, known, first_step)
    return graphs.GraphStepper(model, stepper) if engine == "graph" else stepper
