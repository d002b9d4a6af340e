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
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch

from ..version import __version__
from . import backend

KIND = {"family": "cpu family", "model": "model"}  # of a processor, in /proc/cpuinfo
# What a file that holds no choice raises.
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError)
PACKAGES = ("torch", "onnxruntime", "openvino")  # whose versions change what is fastest


@dataclass(frozen=True)
class Choice:
    """One choice and what it was made from.

    Attributes:
        of: what was chosen for, in words. detail: all else that it depends on, as a digest.
        machine: where: device, processor, threads, versions ... .
        taken: the way that was chosen. seconds: way -> of one call.
        failed: way -> why it cannot run.
    """

    of: str
    detail: str
    machine: dict[str, str | int]
    taken: str
    seconds: dict[str, float]
    failed: dict[str, str]

    def __str__(self) -> str:
        ways = sorted(self.seconds, key=lambda way: (way != self.taken, self.seconds[way]))
        times = [f"{way} {1e3 * self.seconds[way]:.3g} ms" for way in ways]
        return "; ".join([*times, *(f"{way}: {why}" for way, why in self.failed.items())])


def find(of: str, detail: str, device: torch.device) -> Choice | None:
    """The choice that was made of this, in this or another process on this machine."""
    with contextlib.suppress(*DAMAGED):
        choice = _read(_file(of, digest(detail), machine(device)))
        if (choice.of, choice.machine) == (of, machine(device)):
            return choice
    return None


def keep(
    of: str,
    detail: str,
    device: torch.device,
    taken: str,
    seconds: Mapping[str, float],
    failed: Mapping[str, str],
) -> Choice:
    """Remember it, where a file can be written."""
    times = {way: float(s) for way, s in seconds.items()}
    choice = Choice(of, digest(detail), machine(device), taken, times, dict(failed))
    file = _file(choice.of, choice.detail, choice.machine)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, json.dumps(asdict(choice), indent=1))
    return choice


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """That a call takes, after all that was asked of the device before it is done."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def all_of_this_machine() -> Iterator[Choice]:
    """Every choice that would be taken here and now, in the order of their names."""
    found = []
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
            from .._C import cpu_capability

            facts["instructions"] = cpu_capability()
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
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        fields = dict(re.findall(r"^(.+?)\s*: (.+)$", text, re.M))
        if (name := fields.get("model name")) is not None:
            kind = [f"{word} {fields[of]}" for word, of in KIND.items() if of in fields]
            return f"{name.strip()}, {' '.join(kind)}" if kind else name.strip()
    return platform.processor() or platform.machine()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(of: str, detail: str, facts: dict) -> pathlib.Path:
    return folder() / f"{digest(json.dumps([of, detail, facts], sort_keys=True))}.json"


def _read(file: pathlib.Path) -> Choice:
    """Raises: what DAMAGED says, for a file that holds no choice."""
    choice = Choice(**json.loads(file.read_text()))
    texts = choice.of, choice.detail, choice.taken, *choice.failed.values()
    numbers = choice.seconds[choice.taken], *choice.seconds.values()
    kinds = [(text, str) for text in texts] + [(number, float) for number in numbers]
    if not all(isinstance(value, kind) for value, kind in kinds):
        raise TypeError(f"{file} holds no choice")
    return choice


def _write(file: pathlib.Path, text: str) -> None:
    """At once: other processes see the whole text or none."""
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    with os.fdopen(handle, "w") as part:
        part.write(text)
    os.replace(name, file)
