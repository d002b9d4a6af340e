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
    """Raises: ValueError for a device that is not here, or that nothing can run on."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = as_device(name)
    if device.type == "meta":
        raise ValueError("device: wanted one that computes, such as cpu, got meta")
    return device
