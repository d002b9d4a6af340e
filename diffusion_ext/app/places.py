"""Where the command line finds a checkpoint, and the device to use."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checks import as_device
from ..training import CHECKPOINT_NAME


def file_of(checkpoint: Path) -> Path:
    """The file of a checkpoint that may be named by its folder."""
    return checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return as_device(name)
