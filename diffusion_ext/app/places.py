"""The run that a command is about, and the device to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..checks import as_device

# The first argument of each command that is about a run.
RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[RUN]")]
RUN = Path("runs/digits")


def device_of(name: str) -> torch.device:
    """Raises: ValueError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = as_device(name)
    if not _is_here(device):
        raise ValueError(
            f"device: {name} is not there for torch {torch.__version__}; --device cpu always is"
        )
    return device


def _is_here(device: torch.device) -> bool:
    """Asks torch, and starts nothing on the device."""
    if device.type == "cpu":
        return True
    try:
        module = torch.get_device_module(device)
        return module.is_available() and (device.index or 0) < module.device_count()
    except (RuntimeError, AttributeError):  # "meta" and others that nothing can run on
        return False
