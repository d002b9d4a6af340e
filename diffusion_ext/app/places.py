"""Where the command line finds a checkpoint, and the device to use."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checks import as_device
from ..training import CHECKPOINT_NAME


def file_of(checkpoint: Path) -> Path:
    """The file of a checkpoint that may be named by its folder.

    Raises: FileNotFoundError.
    """
    file = checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: no file {file}; `diffusion-ext train` writes one: name the folder of its "
            "run, such as runs/digits"
        )
    return file


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
