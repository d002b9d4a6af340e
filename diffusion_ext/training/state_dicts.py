"""State dicts alone, such as the course's checkpoints: read, and written for other code."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch

from ..nn.context_unet import ContextUnet
from ..nn.loading import context_unet_of, read_state_dict, sizes_of
from ..samplers.schedules import NoiseSchedule
from .checkpoints import load_checkpoint, write_whole

SUFFIXES = (".pth", ".pt", ".safetensors")
COURSE_WINDOW = 4


@dataclass(frozen=True)
class StateDictOptions:
    """What a state dict alone does not tell of its network; by default the course's."""

    schedule: Literal["course", "linear", "cosine"] = "course"
    """of a state dict: the noise schedule it was trained with; the course's is course"""
    timesteps: int = 500
    """of a state dict: noising steps T; the course's are 500"""
    shortcut: Literal["zero", "random", "scaled"] = "zero"
    """of a state dict: the first block's shortcut; the course's is random, a new convolution at
    every call, or zero, what that is on average; scaled is ContextUnet's own"""
    pool_window: int | None = None
    """of a state dict: side of the average pooling; the course's is 4, the default where it fits"""


@dataclass(frozen=True)
class TrainedModel:
    """A network to sample from, in evaluation mode, its schedule, its classes' names, and what it
    predicts."""

    model: ContextUnet
    schedule: NoiseSchedule
    class_names: tuple[str, ...]
    prediction: str = "epsilon"


def load_trained(path: str | Path, options: StateDictOptions | None = None) -> TrainedModel:
    """The averaged weights of a checkpoint of ours, or a ContextUnet's state dict.

    Args:
        path: a checkpoint, or a .pth, .pt or .safetensors of parameters alone; its classes are
            numbered.
        options: what a state dict does not tell.

    Raises: FileNotFoundError; ValueError for a file that is neither.
    """
    path, options = Path(path), options or StateDictOptions()
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if path.suffix not in SUFFIXES:
            raise
    else:
        model, names = checkpoint.build_model(), checkpoint.class_names
        return TrainedModel(model, checkpoint.schedule, names, checkpoint.prediction)
    model = _context_unet(path, options)
    schedule = getattr(NoiseSchedule, options.schedule)(options.timesteps)
    return TrainedModel(model, schedule, tuple(str(i) for i in range(model.n_cfeat)))


def _context_unet(path: Path, options: StateDictOptions) -> ContextUnet:
    """A state dict's network, as the options say."""
    try:
        state = read_state_dict(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path} cannot be read: it is no file of tensors alone, and what else it "
            "holds is refused, for it might be code"
        ) from error
    except Exception as error:  # unpickling raises whatever the bytes make it stumble over
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error
    window = options.pool_window
    if window is None and sizes_of(state, path.name)["bottom"] // COURSE_WINDOW == 1:
        window = COURSE_WINDOW
    return context_unet_of(state, path.name, shortcut=options.shortcut, pool_window=window)


def save_state_dict(model: ContextUnet, path: str | Path) -> None:
    """Writes model's parameters and buffers alone, for code that knows ContextUnet: torch.load and
    load_state_dict(strict=True).

    Raises: ValueError for a path that does not end in .pth, .pt or .safetensors.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"out: wanted a file ending in one of {SUFFIXES}, got {path.name}")
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = io.BytesIO()
    if path.suffix == ".safetensors":
        content.write(safetensors.torch.save(state))
    else:
        torch.save(state, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())
