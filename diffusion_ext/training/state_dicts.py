"""Trained networks from files, and weights alone written for other code."""

from __future__ import annotations

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ..nn.context_unet import ContextUnet
from ..nn.loading import ABOUT_KEY, Weights, context_unet_of, read_state_dict, told_by
from ..samplers.schedules import NoiseSchedule
from .checkpoints import is_checkpoint, load_checkpoint, tables_of, write_whole
from .trained_model import TrainedModel
from .weights_files import SUFFIXES, file_of


@dataclass(frozen=True)
class StateDictOptions:
    """What a state dict alone does not tell of its network; `export` writes it beside the weights,
    and of another file it is the course's by default."""

    schedule: Literal["course", "linear", "cosine"] | None = None
    """of a state dict: the noise schedule it was trained with; default the file's, or course"""
    timesteps: int | None = None
    """of a state dict: noising steps T; default the file's, or 500"""
    shortcut: Literal["zero", "random", "scaled"] | None = None
    """of a state dict: the first block's shortcut; the course's is random, a new convolution at
    every call, or zero, what that is on average; scaled is ContextUnet's own; default the file's,
    or zero"""
    pool_window: int | None = None
    """of a state dict: side of the average pooling; default the file's, or the course's, which is
    4, where it fits"""


def load_trained(
    path: str | Path,
    options: StateDictOptions | None = None,
    *,
    model: nn.Module | None = None,
    averaged: bool = True,
) -> TrainedModel:
    """A network to sample from, its schedule, its classes' names: all that a run has left.

    `dx.load` is this function.

    Args:
        path: the folder of a run, one of its checkpoints, or weights alone: what `export` wrote, or
            a ContextUnet's state dict (.pth, .pt, .safetensors) such as the course's, whose classes
            are numbered.
        options: what a state dict of others does not tell.
        model: of a checkpoint of your own network: one like it, which takes the weights.
        averaged: of a checkpoint: the moving average of the weights, whose samples are the better
            ones, or else the weights as they were trained last.

    Raises: FileNotFoundError, which names what may have been meant; ValueError for a file that is
    neither.
    """
    path = file_of(path)
    if is_checkpoint(path) or path.suffix not in SUFFIXES:
        checkpoint = load_checkpoint(path)
        return TrainedModel(
            checkpoint.build_model(model, averaged), checkpoint.schedule, checkpoint.class_names,
            checkpoint.prediction, dict(checkpoint.training),
        )  # fmt: skip
    if model is not None or not averaged:
        raise ValueError(f"model, averaged: they are of a checkpoint; {path} has weights alone")
    return _of_weights(_read(path), path.name, options or StateDictOptions())


def _read(path: Path) -> Weights:
    try:
        return read_state_dict(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path} cannot be read: it is no file of tensors alone, and what else it "
            "holds is refused, for it might be code"
        ) from error
    except Exception as error:  # unpickling raises whatever the bytes make it stumble over
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error


def _of_weights(weights: Weights, name: str, options: StateDictOptions) -> TrainedModel:
    """Args: name: of the file. Raises: ValueError for weights of another network."""
    about = weights.about
    given = {"shortcut": options.shortcut, "pool_window": options.pool_window}
    given = {option: value for option, value in given.items() if value is not None}
    quirks = {} if about else _of_course(weights, name)
    model = context_unet_of(weights, name, **(quirks | given))
    numbers = [str(i) for i in range(model.n_cfeat)]
    try:
        return TrainedModel(
            model, _schedule(about.get("schedule"), options),
            tuple(map(str, about.get("class_names", numbers))),
            str(about.get("prediction", "epsilon")), dict(about.get("training", {})),
        )  # fmt: skip
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint: {name} tells of its run what cannot be: {error}") from error


def _of_course(weights: Weights, name: str) -> dict[str, Any]:
    """The options of the course's network, as far as they fit the sizes."""
    side = told_by(weights.state, name)["height"] // 4  # of the smallest map
    return {"shortcut": "zero"} | ({"pool_window": 4} if side // 4 == 1 else {})


def _schedule(tables: dict[str, list[float]] | None, options: StateDictOptions) -> NoiseSchedule:
    """Of the tables that a file has, if any, where the options do not choose another."""
    if tables and options.schedule is None:
        own = NoiseSchedule(**{n: np.array(table, np.float64) for n, table in tables.items()})
        if options.timesteps not in (None, own.timesteps):
            raise ValueError(
                f"timesteps: wanted {own.timesteps}, those of the file's schedule, or another "
                f"schedule beside them, got {options.timesteps}"
            )
        return own
    return getattr(NoiseSchedule, options.schedule or "course")(options.timesteps or 500)


def save_state_dict(model: ContextUnet | TrainedModel, path: str | Path) -> None:
    """Writes a network's parameters and buffers alone, for code that knows ContextUnet: torch.load
    and load_state_dict(strict=True).

    Beside them the file tells the network's options, which `load_context_unet` takes, and of a
    TrainedModel its schedule, classes and prediction, which `load_trained` takes.

    Raises: ValueError for a path that does not end in .pth, .pt or .safetensors, and for a network
    that is no ContextUnet.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"out: wanted a file ending in one of {SUFFIXES}, got {path.name}")
    network = model.model if isinstance(model, TrainedModel) else model
    if not isinstance(network, ContextUnet):
        raise ValueError(f"model: wanted a ContextUnet, got {type(network).__name__}")
    about = {"model": network.configuration} | (
        _about(model) if isinstance(model, TrainedModel) else {}
    )
    state = network.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.cpu().contiguous()
    content = io.BytesIO()
    if path.suffix == ".safetensors":
        content.write(safetensors.torch.save(state, {ABOUT_KEY: json.dumps(about)}))
    else:
        state._metadata[""][ABOUT_KEY] = json.dumps(about)  # which torch keeps beside the tensors
        torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def _about(trained: TrainedModel) -> dict[str, Any]:
    """What the weights alone do not tell, as JSON has it."""
    tables = {name: table.tolist() for name, table in tables_of(trained.schedule).items()}
    return {
        "schedule": tables,
        "class_names": list(trained.class_names),
        "prediction": trained.prediction,
        "training": trained.config,
    }
