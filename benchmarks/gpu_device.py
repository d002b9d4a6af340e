"""What is known of the device at hand."""

from __future__ import annotations

import datetime
import platform
import subprocess

import torch

import diffusion_ext as dx


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def facts(device: str) -> dict[str, str]:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "driver": driver() if cuda else "none",
        "diffusion_ext": dx.__version__,
        "date": datetime.date.today().isoformat(),
    }


def limits(device: str) -> dict[str, int]:
    """What csrc/cuda/device_cuda.cuh lets a plan ask of this GPU."""
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes": properties.shared_memory_per_block_optin - 4096,
        "max_cluster": 8 if properties.major >= 9 else 1,
    }
