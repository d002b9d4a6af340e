"""What was built, what serves each op on this machine, and why anything is missing."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import torch

from ..ops import backend, choices
from ..version import __version__

OPS = ("sampler_step", "perturb", "denoising_loss", "philox_normal", "group_norm_act")
ANY_BITS = ("group_norm_act",)  # the ops whose bits are no promise


@dataclass(frozen=True)
class Info:
    """The report of `info()`; its str() is what `diffusion-ext info` prints.

    Attributes:
        versions: of diffusion_ext, torch, numpy, python, CUDA.
        build: how the libraries were compiled, or why they were not.
        backends: op -> device -> "native (...)" or "reference: why".
        choices: what engine="auto" and `optimize_for_sampling` have measured on this machine.
    """

    versions: dict[str, str]
    build: dict[str, str]
    backends: dict[str, dict[str, str]]
    choices: tuple[choices.Choice, ...]

    def __str__(self) -> str:
        lines = ["diffusion_ext", "  versions"]
        lines += [f"    {name:<16}{value}" for name, value in self.versions.items()]
        lines += ["  build"] + [f"    {name:<16}{value}" for name, value in self.build.items()]
        for op, devices in self.backends.items():
            lines.append(f"  {op}")
            lines += [f"    {device:<16}{served}" for device, served in devices.items()]
        lines.append("  float64 and other devices are served by the torch reference")
        if self.choices:
            lines.append(f"  what was measured to be fastest here ({choices.folder()})")
            for choice in self.choices:
                lines += [f"    {choice.of}", f"      {choice}", f"      {choice.how}"]
        return "\n".join(lines)


def info() -> Info:
    """Versions, build facts, the backend of each op on each device, and why one is missing."""
    versions = {
        "diffusion_ext": __version__,
        "torch": torch.__version__,
        "cuda (torch)": torch.version.cuda or "none",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    served = {op: {device: _served(op, device) for device in ("cpu", "cuda")} for op in OPS}
    return Info(versions, _build(), served, tuple(choices.all_of_this_machine()))


def _served(op: str, device: str) -> str:
    if backend.current_backend() == "reference":
        return "reference: chosen by use_backend or DIFFUSION_EXT_BACKEND"
    if device in backend.missing:
        return f"reference: {backend.missing[device]}"
    if device == "cuda":
        return _served_by_cuda()
    return _served_by_cpu(op)


def _served_by_cpu(op: str) -> str:
    from .. import _C

    unit = backend.CPU_CAPABILITY
    if op in ANY_BITS and backend.OUTDONE:
        better = torch.backends.cpu.get_cpu_capability()
        return f"reference: torch uses {better} here, and our kernels {unit}"
    without = "" if _C.has_fma or op in ANY_BITS else ", fma by float64"
    return f"native ({unit}{without}, {torch.get_num_threads()} threads)"


def _served_by_cuda() -> str:
    """Of the GPUs that are here, those that the library was not compiled for are named."""
    count = torch.cuda.device_count()
    lacking = [i for i in range(count) if not backend.has_code(i)]
    why = "; ".join(backend.why_no_code(i) for i in lacking)
    if not lacking:
        return "native"
    return f"reference: {why}" if len(lacking) == count else f"native; reference: {why}"


def _build() -> dict[str, str]:
    """The facts that setup.py left behind, and those compiled into the C++ library."""
    facts = backend.build_record()
    if "cpu" not in backend.missing:
        from .. import _C

        facts.update(_C.build_facts())
    return facts or {"library": "none: this is a pure-Python install"}
