"""The optimizer of a run by its name, its learning rate at each step, and its state by name."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn

from ..checks import did_you_mean
from .config import TrainingConfig
from .sharding import is_cut, laid_as

# Those that want a closure, sparse gradients or matrices alone are left out.
_OTHERS = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}
OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in _OTHERS
}
FUSED_WHEN_CUT = {"Adam", "AdamW"}  # whose fused kernels torch has for DTensors


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Of the parameters that are trained; fused where torch has it.

    Raises: ValueError for an unknown name, an option it does not have or take, and a model without
    parameters to train.
    """
    names = {name.lower(): name for name in OPTIMIZERS}
    if config.optimizer.lower() not in names:
        near = did_you_mean(config.optimizer, sorted(OPTIMIZERS))
        raise ValueError(
            f"optimizer: wanted one of {sorted(OPTIMIZERS)}, got {config.optimizer!r}{near}"
        )
    build = OPTIMIZERS[names[config.optimizer.lower()]]
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: wanted parameters to train, got none that require gradients")
    known = inspect.signature(build).parameters.keys() - {"params", "lr"}
    for name in config.optimizer_options.keys() - known:
        raise ValueError(
            f"optimizer_options: {build.__name__} has {sorted(known)}, got {name!r}"
            f"{did_you_mean(name, known)}"
        )
    cut = any(is_cut(parameter) for parameter in parameters)
    can_fuse = "fused" in known and (not cut or build.__name__ in FUSED_WHEN_CUT)
    fused = {"fused": True} if can_fuse else {}
    try:
        return build(parameters, lr=config.learning_rate, **{**fused, **config.optimizer_options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer_options: {error}") from error


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """At a step of a planned run, counted from 0.

    The linear one falls by the epoch, as the course's; by the step in a run that ends within one.
    """
    if config.lr_schedule == "linear":
        every = 1 if config.steps % steps_per_epoch else steps_per_epoch
        factor = 1 - step // every * every / config.steps
    elif config.lr_schedule == "cosine":
        factor = (1 + math.cos(math.pi * step / config.steps)) / 2
    else:
        factor = 1.0
    return config.learning_rate * factor * min(1, (step + 1) / max(config.warmup, 1))


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(tensors, numbers) by `<parameter>.<name>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    values = {
        f"{names[parameter]}.{name}": value
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
    }
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: dict[str, Tensor],
    numbers: dict[str, float],
) -> None:
    """Takes up the state that `optimizer_state` told."""
    parameters = dict(model.named_parameters())
    index = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    state: dict[int, dict] = {}
    for key, value in {**tensors, **numbers}.items():
        name, _, field = key.rpartition(".")
        parameter = parameters[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = laid_as(value, parameter)  # a moment
        state.setdefault(index[parameter], {})[field] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
