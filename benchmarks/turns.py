"""Times the implementations of a work in turns, so that what slows a shared machine slows all.

pytest-benchmark times one test after the other, each in a window of its own; a neighbour's second
then falls on one implementation and not on the other. So the rows of a work are timed together,
when the first of them is run, and each test tells pytest-benchmark of its own rounds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .device import clock, grow_heap
from .work import Check, Work

TURNS = 6
ROUND = 1e-4  # seconds at least: many times what the clock takes


@dataclass
class Rounds:
    """seconds: of each round of `calls` calls."""

    calls: int = 1
    seconds: list[float] = field(default_factory=list)


class Turns:
    """The implementations of a work, on the same inputs."""

    def __init__(self, work: Work, names: Iterable[str], seconds: float):
        """names: of the implementations to be timed together, for so many seconds each."""
        self.work, self.names, self.seconds = work, list(names), seconds
        self.check = Check(work, work.inputs())
        self._checked: dict[str, tuple[Callable, float | None] | Exception] = {}
        self._rounds: dict[str, Rounds] | None = None

    def checked(self, name: str) -> tuple[Callable, float | None]:
        """(a call without arguments, the error of its result); raises what the check raises."""
        if name not in self._checked:
            try:
                self._checked[name] = self._check(name)
            except Exception as error:  # of this row, whichever row has asked
                self._checked[name] = error
        found = self._checked[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _check(self, name: str) -> tuple[Callable, float | None]:
        implementation, inputs = self.work.implementations[name], self.check.inputs
        with implementation.around():
            call = implementation.make(*inputs)
            error = self.check.error_of(implementation, call)
        return lambda: call(*inputs), error

    def rounds(self, name: str) -> Rounds:
        if self._rounds is None:
            self._rounds = self._time_all()
        return self._rounds[name]

    def _time_all(self) -> dict[str, Rounds]:
        grow_heap()
        calls = {}
        for name in self.names:
            try:
                calls[name] = self.checked(name)[0]
            except Exception:  # its own test tells
                continue
        rounds = {name: Rounds() for name in calls}
        for _ in range(TURNS):
            for name, call in calls.items():
                with self.work.implementations[name].around():
                    take_turn(call, rounds[name], self.seconds / TURNS)
        return rounds


def take_turn(call: Callable, rounds: Rounds, seconds: float) -> None:
    """Rounds for so many seconds, after a call that finds the caches as the others left them."""
    collected = gc.isenabled()
    gc.disable()
    try:
        once = round_of(call, 1)
        if once >= seconds:  # too long to do it twice
            rounds.seconds.append(once)
            return
        if not rounds.seconds:
            rounds.calls = max(1, round(ROUND / round_of(call, 1)))
        end = clock() + seconds
        while clock() < end:
            rounds.seconds.append(round_of(call, rounds.calls))
    finally:
        if collected:
            gc.enable()


def round_of(call: Callable, calls: int) -> float:
    start = clock()
    for _ in range(calls):
        call()
    return clock() - start


class Replay:
    """A timer that tells pytest-benchmark of rounds that were timed before."""

    def __init__(self):
        self._times = iter(())

    def __call__(self) -> float:
        return next(self._times)

    def of(self, rounds: Rounds) -> dict[str, int]:
        """The arguments of benchmark.pedantic."""
        self._times = iter([time for seconds in rounds.seconds for time in (0.0, seconds)])
        return {"rounds": len(rounds.seconds), "iterations": rounds.calls}


replay = Replay()
