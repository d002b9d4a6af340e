"""Checkpoints: a whole run in one safetensors file, replaced atomically.

Tensors are named `model.*`, `ema.*`, `optimizer.*` and `schedule.*`; the rest is JSON in the
file's metadata. One file cannot be half new and half old, and loading it executes nothing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..nn.context_unet import ContextUnet
from ..samplers.schedules import NoiseSchedule

METADATA_KEY = "diffusion_ext"
TENSOR_GROUPS = ("model", "ema", "optimizer")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Enough of a run to sample from it and to continue it.

    Attributes:
        model, ema: state dicts of the model as trained, and of its moving average.
        optimizer: Adam's state, `<parameter>.<name>` -> tensor.
        schedule: the noise schedule.
        model_configuration: the arguments of ContextUnet.
        training: the fields of TrainingConfig.
        class_names: one for each context feature.
        losses: the mean loss of each epoch so far.
        steps, samples_seen: how many weight updates there were, and images in them.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    schedule: NoiseSchedule
    model_configuration: dict[str, int | str]
    training: dict[str, int | float]
    class_names: tuple[str, ...]
    losses: list[float]
    steps: int
    samples_seen: int

    def build_model(self) -> ContextUnet:
        """A new model with the averaged weights, in evaluation mode."""
        model = ContextUnet(**self.model_configuration)
        model.load_state_dict(self.ema)
        return model.eval()


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Writes `path` so that a kill at any moment leaves the old file or the new one, whole."""
    path = Path(path)
    tensors = {
        f"{group}.{name}": tensor.contiguous()
        for group in TENSOR_GROUPS
        for name, tensor in getattr(checkpoint, group).items()
    }
    tensors["schedule.beta"] = torch.tensor(checkpoint.schedule.beta)
    tensors["schedule.alpha_bar"] = torch.tensor(checkpoint.schedule.alpha_bar)
    rest = {
        name: value
        for name, value in vars(checkpoint).items()
        if name not in (*TENSOR_GROUPS, "schedule")
    }
    write_whole(path, save(tensors, metadata={METADATA_KEY: json.dumps(rest)}))


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces a file so that a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # the content reaches the disk before the name does
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Raises: FileNotFoundError; ValueError for a file that is not a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {})[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint: {path} is not a diffusion_ext checkpoint") from error
    groups = {group: _with_prefix(tensors, group) for group in (*TENSOR_GROUPS, "schedule")}
    tables = {name: table.numpy() for name, table in groups.pop("schedule").items()}
    rest["class_names"] = tuple(rest["class_names"])
    return Checkpoint(**groups, schedule=NoiseSchedule(**tables), **rest)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
