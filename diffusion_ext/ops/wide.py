"""float64, also of what lies on a device that has none."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = ("mps",)  # types of devices without float64: Apple's GPUs


def wide_device(device: torch.device) -> torch.device:
    """Where float64 of what lies on device is computed: there, or on the CPU."""
    return torch.device("cpu") if device.type in NARROW else device


def wide(tensor: Tensor) -> Tensor:
    """In float64, on its `wide_device`."""
    return tensor.to(wide_device(tensor.device), torch.float64)
