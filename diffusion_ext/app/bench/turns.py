"""Times the ways by turns, each in its own process, so that what slows the machine slows all."""

from __future__ import annotations

import contextlib
import math
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tqdm import tqdm

from ...ops.memory import memory_available
from .subject import WAYS, Request, refusal
from .worker import Ready, serve

TURNS = 5
SLICE = 0.4  # seconds of a turn at most
TIMING_SHARE = 0.4  # of the time, which no compiler may take
PATIENT = ("eager", "ours")  # ways that are waited for
LATE = ("openvino", "onnxruntime", "compile")  # until a time; the quickest first, which leave most
# What a late way holds at most while it is made ready, as times what eager does.
MEMORY = {"openvino": 2.5, "onnxruntime": 2.5, "compile": 1.5}
GIB = 1 << 30
TO_END = 1.0  # seconds for a process to end by itself
KILLED = -9  # what a process ends with that Linux has killed
SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Way:
    """A way and what became of it.

    Attributes:
        ready: None where it failed, or took too long: `failure` says so.
        times: seconds of one use, for each part and round.
        group: of the ways that took turns with each other; eager did with those of every group.
    """

    name: str
    ready: Ready | None = None
    failure: str = ""
    times: dict[str, list[float]] = field(default_factory=dict)
    group: int = 0

    def best(self, part: str) -> float:
        return min(self.times[part])

    def seconds_of_a_batch(self) -> float:
        """All parts, as often as a batch of pictures needs them."""
        return sum(uses * self.best(part) for part, uses in self.ready.parts)

    def difference(self, other: Way) -> float:
        """The largest from the other way's results, over the largest value."""
        pairs = zip(self.ready.outputs, other.ready.outputs, strict=True)
        return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


class Process:
    """A way's process, in a session of its own where there are any, so that its compilers end with
    it. Windows has none: there they end when they have compiled."""

    def __init__(self, request: Request):
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self.connection.send(request)

    def received(self) -> Ready | list[float]:
        """Raises: what the process raised; RuntimeError where it died."""
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            status = self.process.exitcode
            told = "killed, as for lack of memory" if status == KILLED else f"{status=}"
            raise RuntimeError(f"its process ended: {told}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def timed(self, part: int, seconds: float) -> list[float]:
        self.connection.send((part, seconds))
        return self.received()

    def end(self) -> None:
        self.connection.close()  # which ends it, unless it is at work
        multiprocessing.connection.wait([self.process.sentinel], TO_END)
        if hasattr(os, "killpg"):  # its compilers may outlive it
            with contextlib.suppress(ProcessLookupError):  # it has not begun its session
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def measured(request: Request, seconds: float) -> dict[str, Way]:
    """Every way, made ready and timed by turns, in about so many seconds: longer where eager and
    ours alone need it. The others share what they leave, each what the one before has not used.

    Where not all fit in memory at once they take turns in groups, eager in each.

    Raises: ValueError, TypeError, OSError or ImportError where the eager way fails: then there is
    nothing to compare with.
    """
    end = time.perf_counter() + seconds
    ready_by = end - TIMING_SHARE * seconds
    ways, processes = {name: Way(name) for name in WAYS}, {}
    for name in LATE:
        ways[name].failure = refusal(request, name)
    late = [name for name in LATE if not ways[name].failure]
    try:
        _make_ready(ways, processes, request, PATIENT, math.inf)
        for i, name in enumerate(late):
            if not _fits(ways, name) and time.perf_counter() < ready_by:
                _let_go(ways, processes, TIMING_SHARE * seconds / (1 + len(late)))
            if not _fits(ways, name):
                wanted, free = _wanted(ways, name) / GIB, memory_available() / GIB
                ways[name].failure = f"wants about {wanted:.1f} GiB of memory, {free:.1f} are free"
                continue
            left = ready_by - time.perf_counter()
            _make_ready(
                ways, processes, request, (name,), time.perf_counter() + left / (len(late) - i)
            )
        time_all(ways, dict(processes), end)
    finally:
        for process in processes.values():
            process.end()
    return ways


def _make_ready(
    ways: dict[str, Way],
    processes: dict[str, Process],
    request: Request,
    names: Sequence[str],
    until: float,
) -> None:
    """Adds the processes of those that are ready by then."""
    if time.perf_counter() > until:
        for name in names:
            ways[name].failure = "no time was left for it, --seconds gives it some"
        return
    group = max(way.group for way in ways.values())
    for name in names:
        processes[name] = Process(replace(request, way=name))
        ways[name].group = group
    _await(ways, {name: processes[name] for name in names}, until)
    for name in names:
        if ways[name].ready is None:
            processes.pop(name).end()


def _wanted(ways: dict[str, Way], name: str) -> float:
    """Bytes, which a late way may hold."""
    return MEMORY[name] * ways["eager"].ready.peak


def _fits(ways: dict[str, Way], name: str) -> bool:
    return _wanted(ways, name) <= memory_available()


def _let_go(ways: dict[str, Way], processes: dict[str, Process], seconds: float) -> None:
    """Times the ways that are ready and ends them, but for eager: what comes is a new group."""
    others = [name for name in processes if name != "eager"]
    if not others:
        return
    time_all(ways, dict(processes), time.perf_counter() + seconds)
    for name in others:
        processes.pop(name).end()
    ways["eager"].group += 1


def _await(ways: dict[str, Way], processes: dict[str, Process], until: float) -> None:
    """Until each is ready, has failed, or the time is over."""
    waiting, start = dict(processes), time.perf_counter()
    with tqdm(bar_format="{desc} {elapsed}", leave=False, disable=None) as bar:
        while waiting:
            bar.set_description_str("getting ready: " + ", ".join(WAYS[name] for name in waiting))
            for name, process in list(waiting.items()):
                if process.connection.poll(0.1):
                    receive(ways[name], process)
                elif time.perf_counter() > until:
                    waited = f"{time.perf_counter() - start:.0f} s"
                    ways[name].failure = f"not ready in {waited}, --seconds gives it longer"
                else:
                    continue
                del waiting[name]
            bar.refresh()


def receive(way: Way, process: Process) -> None:
    try:
        way.ready = process.received()
    except Exception as error:
        leave_out(way, error)


def leave_out(way: Way, error: Exception) -> None:
    """Raises the error of the eager way."""
    if way.name == "eager":
        if isinstance(error, RuntimeError):  # torch's, or the process has died
            raise ValueError(f"model: torch itself cannot run it here: {error}") from error
        raise error
    way.failure, way.times = str(error).strip().partition("\n")[0], {}


def time_all(ways: dict[str, Way], processes: dict[str, Process], until: float) -> None:
    """Every part in every process by turns, until the time is over; once at least."""
    parts = [name for name, _ in ways["eager"].ready.parts]
    left = TURNS * len(parts) * len(processes)
    with tqdm(total=left, desc="timing", unit="turn", leave=False, disable=None) as bar:
        for _ in range(TURNS):
            for i, part in enumerate(parts):
                for name, process in list(processes.items()):
                    seconds = max(0.0, min(SLICE, (until - time.perf_counter()) / left))
                    try:
                        ways[name].times.setdefault(part, []).extend(process.timed(i, seconds))
                    except (RuntimeError, ConnectionError) as error:
                        leave_out(ways[name], error)
                        del processes[name]
                    left -= 1
                    bar.update()
            if time.perf_counter() > until:
                break
