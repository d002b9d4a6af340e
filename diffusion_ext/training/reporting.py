"""What a run tells people: its configuration, and a line for each checkpoint."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..version import __version__
from .compatibility import configuration_of
from .sharding import class_name

if TYPE_CHECKING:
    from .trainer import Trainer


def description(run: Trainer) -> dict:
    """What config.json tells."""
    return {
        "diffusion_ext": __version__,
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "processes": run.processes.count,
        "model": {"class": class_name(run.model), **configuration_of(run.model)},
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "timesteps": run.schedule.timesteps,
        "training": asdict(run.config),
        "images": len(run.images),
        "held_out": len(run.data) - len(run.images),
        "shape": list(run.data.shape),
        "classes": list(run.data.class_names),
        **run.about,
    }


def epoch_label(run: Trainer, epoch: int) -> str:
    return f"epoch {epoch:{len(str(run.config.epochs))}}/{run.config.epochs}"


def epoch_line(run: Trainer, speed: float) -> str:
    """What the last epoch came to, and how long the others will take.

    Args: speed: images a second; 0 where a resumed run found the epoch trained.
    """
    parts = [epoch_label(run, run.epoch), f"loss {run.losses[-1]:.4f}"]
    if run.validation_losses:
        parts.append(f"held out {run.validation_losses[-1]:.4f}")
    if run.progress.skipped:
        parts.append(f"{run.progress.skipped} of {run.steps} steps skipped")
    if run.epoch < run.config.epochs and speed:
        left = (run.config.epochs - run.epoch) * len(run.images) / speed
        parts.append(f"{tqdm.format_interval(left)} left")
    return "  ".join([*parts, f"{speed:.0f} images/s"])
