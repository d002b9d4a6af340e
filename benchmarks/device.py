"""What is known of the device at hand, and its clock."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import subprocess
import time
from importlib import metadata

import torch

import diffusion_ext as dx
from diffusion_ext.ops.choices import processor
from diffusion_ext.ops.conv2d import CPU_CAPABILITY

LIBRARIES = ("numpy", "diffusers", "openvino", "onnxruntime", "apex", "liger-kernel")


def clock() -> float:
    """Seconds, after all that was asked of the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def warm_heap():
    """glibc keeps all memory that is freed, from here on, as it does of its own in some processes.

    It gives a block of a few MB back to Linux when it is freed, and asks for it anew, until larger
    ones (up to 32 MB) have been freed: eager torch, with its temporaries, can take 8 times as long
    before than after. Above 32 MB that remains so, unless there happens to be room.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    yield


def cpu_name() -> str:
    """Such as "AMD EPYC, 2 threads, AVX512": torch's threads, and the instructions it uses."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor()}, {torch.get_num_threads()} threads, {capability}"


@functools.cache
def of_nvidia_smi(field: str) -> str:
    query = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def issue_rate() -> float | None:
    """Instructions of warps that the GPU can issue in a second: four a multiprocessor and cycle."""
    clock = of_nvidia_smi("clocks.max.sm")
    return 4 * limits()["multiprocessors"] * 1e6 * float(clock) if clock.isdigit() else None


def version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "none"


def facts(device: str) -> dict[str, str]:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        **({} if cuda else {"instructions": CPU_CAPABILITY}),  # of our kernels
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "driver": of_nvidia_smi("driver_version") if cuda else "none",
        "diffusion_ext": dx.__version__,
        **{library: found for library in LIBRARIES if (found := version(library)) != "none"},
        "date": datetime.date.today().isoformat(),
    }


def limits() -> dict[str, int]:
    """What csrc/cuda/device_cuda.cuh lets a plan ask of this GPU."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "multiprocessors": properties.multi_processor_count,
        "shared_bytes": properties.shared_memory_per_block_optin - 4096,
        "max_cluster": 8 if properties.major >= 9 else 1,
    }
