"""What fits together: a network and its data, a run and the checkpoint that it goes on from."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
from torch import nn

from ..nn.context_unet import ContextUnet
from ..samplers.schedules import NoiseSchedule
from .checkpoints import Checkpoint
from .config import FREE, TrainingConfig


def configuration_of(model: nn.Module) -> dict:
    """The arguments of a ContextUnet; {} of another network."""
    return dict(model.configuration) if isinstance(model, ContextUnet) else {}


def check_fit(model: nn.Module, data) -> None:
    """Where a model tells what it takes, as a ContextUnet does, the data is that.

    Raises: ValueError.
    """
    sizes = [getattr(model, name, None) for name in ("in_channels", "height", "height")]
    if None not in sizes and list(data.shape) != sizes:
        raise ValueError(
            f"data: wanted images {['N', *sizes]} for this model, got {[len(data), *data.shape]}"
        )
    features = getattr(model, "n_cfeat", None)
    if None not in (features, data.context_shape) and data.context_shape != (features,):
        raise ValueError(
            f"data: wanted contexts ['N', {features}] for this model, "
            f"got {[len(data), *data.context_shape]}"
        )


def check_same_run(
    checkpoint: Checkpoint, model: nn.Module, config: TrainingConfig, schedule: NoiseSchedule
) -> None:
    """The checkpoint is of such a run, of any length. Raises: ValueError naming what differs."""
    wanted = configuration_of(model) | asdict(config)
    # An older checkpoint lacks what was fixed then, at the default of today.
    found = checkpoint.model_configuration | asdict(TrainingConfig()) | checkpoint.training
    for name in sorted(wanted.keys() - FREE):
        if wanted[name] != found.get(name):
            raise ValueError(
                f"{name}: the checkpoint to resume has {found.get(name)}, this run {wanted[name]}"
            )
    if not np.array_equal(checkpoint.schedule.alpha_bar, schedule.alpha_bar):
        raise ValueError("schedule: the checkpoint to resume has another one")
