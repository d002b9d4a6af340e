"""Checkpoints: a whole run in one safetensors file, replaced atomically.

Tensors are named `model.*`, `ema.*`, `optimizer.*` and `schedule.*`; the rest is JSON in the
file's metadata, and so is a digest of it all. One file cannot be half new and half old, loading it
executes nothing, and a file that was damaged is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..nn.loading import filled_context_unet, tensors_in
from ..samplers.schedules import NoiseSchedule
from .held_files import patiently
from .weights_files import CHECKPOINT_NAME, file_of

METADATA_KEY, DIGEST_KEY = "diffusion_ext", "sha256"
TENSOR_GROUPS = ("model", "ema", "optimizer")
KINDS = {
    "model_configuration": dict, "training": dict, "class_names": list, "losses": list,
    "validation_losses": list, "steps": int, "samples_seen": int, "epoch_batches": int,
    "epoch_images": int, "skipped_steps": int,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Enough of a run to sample from it and to continue it.

    Attributes:
        model, ema: state dicts of the model as trained, and of its moving average.
        optimizer: the optimizer's tensors, `<parameter>.<name>` -> tensor.
        schedule: the noise schedule.
        model_configuration: the arguments of ContextUnet; {} for another network.
        training: the fields of TrainingConfig.
        class_names: one for each context feature.
        losses: the mean loss of each epoch so far.
        steps, samples_seen: how many weight updates there were, and images in them.
        validation_losses: after each epoch, where images are held out; NaN where not measured.
        epoch_batches, epoch_loss, epoch_images: how many batches of the next epoch were trained
            already, the sum of their images' losses, and how many images that were.
        optimizer_numbers: what of the optimizer's state is no tensor. scaler: of float16.
        skipped_steps: steps left out because their loss or gradient was not finite.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    schedule: NoiseSchedule
    model_configuration: dict[str, int | str]
    training: dict[str, Any]
    class_names: tuple[str, ...]
    losses: list[float]
    steps: int
    samples_seen: int
    validation_losses: list[float] = field(default_factory=list)
    epoch_batches: int = 0
    epoch_loss: float = 0.0
    epoch_images: int = 0
    optimizer_numbers: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0

    @classmethod
    def of(cls, tensors: dict[str, Tensor], fields: dict[str, Any], path: str | Path) -> Checkpoint:
        """Of tensors by `<group>.<name>` and of the rest, both read from a file.

        Raises: ValueError where they are not a checkpoint's.
        """
        groups = {group: _with_prefix(tensors, group) for group in (*TENSOR_GROUPS, "schedule")}
        try:
            if not isinstance(fields, dict):
                raise TypeError(f"its fields are {fields!r}")
            for name, kind in KINDS.items():
                if not isinstance(fields.get(name, kind()), kind):
                    raise TypeError(f"{name} is {fields[name]!r}")
            names = tuple(fields["class_names"])
            tables = {name: table.numpy() for name, table in groups.pop("schedule").items()}
            rest = {**fields, "class_names": names, "schedule": NoiseSchedule(**tables)}
            return cls(**groups, **rest)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f"checkpoint: {path} has not what a checkpoint has: {error}"
            ) from error

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.training.get("prediction", "epsilon")

    def build_model(self, model: nn.Module | None = None, averaged: bool = True) -> nn.Module:
        """A new ContextUnet with the averaged weights, in evaluation mode.

        Args:
            model: where another network was trained, one like it, which takes the weights.
            averaged: the moving average, or else the weights as they were trained last.

        Raises: ValueError where there is neither, or the weights are of another network.
        """
        weights = self.ema if averaged else self.model
        if model is None:
            if not self.model_configuration:
                raise ValueError(
                    "model: this checkpoint is of your own network; hand one over, as in "
                    "dx.load(path, model=network)"
                )
            return filled_context_unet(weights, "this checkpoint", self.model_configuration)
        model.load_state_dict(weights)
        return model.eval()


def save_checkpoint(checkpoint: Checkpoint, path: str | Path) -> None:
    """Writes `path` so that a kill at any moment leaves the old file or the new one, whole.

    Raises: OSError where it cannot be written, which leaves the old file.
    """
    path = Path(path)
    tensors = {
        f"{group}.{name}": tensor.contiguous()
        for group in TENSOR_GROUPS
        for name, tensor in getattr(checkpoint, group).items()
    }
    tensors |= {f"schedule.{name}": t for name, t in tables_of(checkpoint.schedule).items()}
    rest = json.dumps(fields_of(checkpoint))
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: rest, DIGEST_KEY: _digest(tensors, rest)}
    write_whole(path, save(_apart(tensors), metadata=metadata))


def tables_of(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """float64 [T+1], by their names."""
    return {"beta": torch.tensor(schedule.beta), "alpha_bar": torch.tensor(schedule.alpha_bar)}


def fields_of(checkpoint: Checkpoint) -> dict:
    """What of a checkpoint is no tensor, as JSON has it."""
    tensors = (*TENSOR_GROUPS, "schedule")
    return {name: value for name, value in vars(checkpoint).items() if name not in tensors}


def _digest(tensors: dict[str, Tensor], rest: str) -> str:
    """SHA-256 of names, kinds, shapes and contents; rest: the JSON beside the tensors."""
    digest = hashlib.sha256(rest.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, which safetensors wants: tied weights are written twice."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def write_whole(path: Path, content: bytes) -> None:
    """Writes or replaces a file so that a kill at any moment leaves the old one or the new one.

    Raises: OSError, naming the file; the old one is whole then, and no part of the new one is left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        patiently(os.replace, temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise type(error)(error.errno, reason, str(path)) from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU. Args: path: its file, or the folder of its run.

    Raises: FileNotFoundError, which names what may have been meant; ValueError for a file that is
    not a checkpoint, was cut short, or is not as it was written.
    """
    path = file_of(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            rest = metadata[METADATA_KEY]
            tensors = tensors_in(file)
    except KeyError as error:
        raise ValueError(
            f"checkpoint: {path} is not a diffusion_ext checkpoint{_its_run(path)}"
        ) from error
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: {path} is not a diffusion_ext checkpoint, or was cut short: {error}"
            f"{_its_run(path)}"
        ) from error
    # Checkpoints of versions before this one have no digest.
    if metadata.get(DIGEST_KEY, "") not in ("", _digest(tensors, rest)):
        raise ValueError(f"checkpoint: {path} is damaged: its content is not what was written")
    try:
        return Checkpoint.of(tensors, json.loads(rest), path)
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint: {path} has not what a checkpoint has: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of a whole run, damaged or not."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except SafetensorError:
        return False


def _its_run(path: Path) -> str:
    """The end of a message that a file is no checkpoint, where it lies beside one."""
    checkpoint = path.with_name(CHECKPOINT_NAME)
    return f"; did you mean {path.parent}?" if path != checkpoint and checkpoint.is_file() else ""


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = prefix + "."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
