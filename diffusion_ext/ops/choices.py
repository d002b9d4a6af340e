"""What was fastest on this machine: measured once, then kept in a file of its own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from ..version import __version__
from . import backend
from .measuring import Measured

# Of a processor, in /proc/cpuinfo: x86's, and ARM's, which has no name there.
KIND = {"family": "cpu family", "model": "model"}
KIND |= {"implementer": "CPU implementer", "part": "CPU part"}
CPUINFO = pathlib.Path("/proc/cpuinfo")
STARTED = time.time()  # this process
# What a file that holds no choice raises.
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError)
PACKAGES = ("torch", "onnxruntime", "openvino")  # whose versions change what is fastest


@dataclass(frozen=True)
class Choice(Measured):
    """One choice and the measurement that it was made from.

    Attributes:
        of: what was chosen for, in words. detail: all else that it depends on, as a digest.
        machine: where: device, processor, threads, versions ... .
        taken: the way that was chosen.
    """

    of: str
    detail: str
    machine: dict[str, str | int]
    taken: str

    def __str__(self) -> str:
        ways = sorted(self.seconds, key=lambda way: (way != self.taken, self.seconds[way]))
        times = [f"{way} {1e3 * self.seconds[way]:.3g} ms" for way in ways]
        return "; ".join([*times, *(f"{way}: {why}" for way, why in self.failed.items())])

    @property
    def how(self) -> str:
        """When and how it was measured, in words, and whether a file keeps it."""
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.when))
        told = (
            f"measured {day} in {self.took:.3g} s, {self.rounds} rounds; the best turns of a way "
            f"differ by {self.spread:.0%}, no core for {self.waited:.0%} of the time"
        )
        return f"{told}; in doubt, so no file keeps it" if self.doubt else told


# Of this process: file -> the choice that it does not hold, since that is in doubt.
_doubted: dict[pathlib.Path, Choice] = {}


def find(of: str, detail: str, device: torch.device) -> Choice | None:
    """The choice that was made of this, in this or another process on this machine.

    Where DIFFUSION_EXT_MEASURE is "again", only one of this process counts.
    """
    since = STARTED if _again() else 0.0
    with contextlib.suppress(*DAMAGED):
        choice = _read(_file(of, digest(detail), machine(device)))
        if (choice.of, choice.machine) == (of, machine(device)) and choice.when >= since:
            return choice
    return None


def _again() -> bool:
    told = os.environ.get("DIFFUSION_EXT_MEASURE", "")
    if told not in ("", "again"):
        warnings.warn(f"DIFFUSION_EXT_MEASURE: wanted 'again', got {told!r}", stacklevel=4)
    return told == "again"


def keep(of: str, detail: str, device: torch.device, taken: str, measured: Measured) -> Choice:
    """Remember it where a file can be written and the measurement leaves no doubt."""
    choice = Choice(
        **asdict(measured), of=of, detail=digest(detail), machine=machine(device), taken=taken
    )
    file = _file(choice.of, choice.detail, choice.machine)
    if choice.doubt:
        _doubted[file] = choice
        return choice
    _doubted.pop(file, None)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(asdict(choice), indent=1))
    return choice


def all_of_this_machine() -> Iterator[Choice]:
    """Every choice that would be taken here and now, and those of this process that are in doubt,
    in the order of their names."""
    found = [choice for file, choice in _doubted.items() if file.parent == folder()]
    for file in folder().glob("*.json"):
        # AssertionError, RuntimeError: torch's, of a device that is not here.
        with contextlib.suppress(*DAMAGED, AssertionError, RuntimeError):
            choice = _read(file)
            if choice.machine == machine(torch.device(choice.machine["device"])):
                found.append(choice)
    return iter(sorted(found, key=lambda choice: choice.of))


def folder() -> pathlib.Path:
    """Where choices are kept: DIFFUSION_EXT_CACHE, or the user's cache, or with the temporary files
    of a user without a home."""
    if own := os.environ.get("DIFFUSION_EXT_CACHE"):
        return pathlib.Path(own)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(cache) / "diffusion_ext"
    try:
        cache = pathlib.Path.home() / ".cache"
    except RuntimeError:
        cache = pathlib.Path(tempfile.gettempdir())
    return cache / "diffusion_ext"


def machine(device: torch.device) -> dict[str, str | int]:
    """What a choice depends on, beside the work itself."""
    facts = {"device": device.type, "diffusion_ext": __version__, "ops": backend.current_backend()}
    if device.type == "cpu":
        facts |= {"processor": processor(), "threads": torch.get_num_threads()}
        if "cpu" not in backend.missing:
            facts["instructions"] = backend.CPU_CAPABILITY
    elif device.type == "cuda":
        facts["processor"] = torch.cuda.get_device_name(device)
    return facts | _versions()


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def processor() -> str:
    """Its name and kind, such as "AMD EPYC, family 26 model 2": virtual machines often hide which
    of a maker's processors they have in the name."""
    if sys.platform == "darwin":
        ask = ("sysctl", "-n", "machdep.cpu.brand_string")  # platform says "arm" of each
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(OSError):
        text = CPUINFO.read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(.+?)\s*: (.+)$", text, re.M))
        name = fields.get("model name", platform.machine()).strip()
        if kind := [f"{word} {fields[of]}" for word, of in KIND.items() if of in fields]:
            return f"{name}, {' '.join(kind)}"
        if "model name" in fields:
            return name
    return platform.processor() or platform.machine()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(of: str, detail: str, facts: dict) -> pathlib.Path:
    return folder() / f"{digest(json.dumps([of, detail, facts], sort_keys=True))}.json"


def _read(file: pathlib.Path) -> Choice:
    """Raises: what DAMAGED says, for a file that holds no choice."""
    choice = Choice(**json.loads(file.read_text(encoding="utf-8")))
    texts = choice.of, choice.detail, choice.taken, *choice.failed.values()
    numbers = choice.seconds[choice.taken], *choice.seconds.values(), choice.when, choice.took
    numbers += choice.spread, choice.waited, float(choice.rounds)
    kinds = [(text, str) for text in texts] + [(number, float) for number in numbers]
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise TypeError(f"{file} holds no choice")
    return choice


def _write(file: pathlib.Path, text: str) -> None:
    """At once: other processes see the whole text or none."""
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as part:
            part.write(text)
        os.replace(name, file)
    except OSError:  # a full disk, or on Windows, while another process reads what is there
        os.unlink(name)
        raise
