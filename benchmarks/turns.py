"""Times the implementations of a work in turns, so that what slows a shared machine slows all.

pytest-benchmark times one test after the other, each in a window of its own; a neighbour's second
then falls on one implementation and not on the other. So the rows of a work are timed together,
when the first of them is run, and each test tells pytest-benchmark of its own rounds.

On the CPU each row has a process of its own, because what a call costs there hangs on the heap that
earlier ones have left: see device.warm_heap.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .device import clock
from .work import Check, Work

TURNS = 6
ROUND = 1e-4  # seconds at least: many times what the clock takes
PRELOADED = ["benchmarks.suite", "diffusers.schedulers", "diffusers.models", "torch._inductor"]
PATIENCE = 300  # seconds for a process to be ready, compilation and all


@dataclass
class Rounds:
    """seconds: of each round of `calls` calls."""

    calls: int = 1
    seconds: list[float] = field(default_factory=list)


# --- one row --------------------------------------------------------------------------------------


def seeded(work: Work) -> tuple:
    """The inputs that every row in a process of its own has."""
    torch.manual_seed(0)
    return work.inputs()


class Player:
    """A row in this process."""

    def __init__(self, work: Work, name: str):
        self.around, self.rounds = work.implementations[name].around, Rounds()
        inputs = seeded(work)
        with self.around():
            call = work.implementations[name].make(*inputs)
            call(*inputs)  # compiles
        self.inputs, self.call = inputs, lambda: call(*inputs)

    def play(self, seconds: float) -> None:
        """Rounds for so long, after a call that finds the caches as the other rows left them."""
        collected = gc.isenabled()
        gc.disable()
        try:
            with self.around():
                self._play(seconds)
        finally:
            if collected:
                gc.enable()

    def _play(self, seconds: float) -> None:
        rounds, once = self.rounds, self._round(1)
        if once >= seconds:  # too long to do it twice
            rounds.seconds.append(once)
            return
        if not rounds.seconds:
            rounds.calls = max(1, round(ROUND / self._round(1)))
        end = clock() + seconds
        while clock() < end:
            rounds.seconds.append(self._round(rounds.calls))

    def _round(self, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            self.call()
        return clock() - start

    def end(self) -> None:
        pass


def serve(connection, find: Callable[[], Work], name: str) -> None:
    """Plays for the seconds that it is sent, and sends its rounds so far, until it is sent None."""
    player = Player(find(), name)
    connection.send(player.rounds)
    serve_rounds(connection, player)


def serve_rounds(connection, player: Player) -> None:
    while (seconds := connection.recv()) is not None:
        player.play(seconds)
        connection.send(player.rounds)


def forked(target: Callable, *arguments):
    """(process, connection) of target(connection, *arguments), forked from a process that has only
    imported things."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the server
    connection, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, connection


def received(connection, patience: float = PATIENCE):
    """Raises: TimeoutError; EOFError where the process has ended."""
    if not connection.poll(patience):
        raise TimeoutError("the row's process does not answer")
    return connection.recv()


class RemotePlayer:
    """A row in a process of its own."""

    def __init__(self, find: Callable[[], Work], name: str):
        self.process, self.connection = forked(serve, find, name)
        self.rounds = received(self.connection)

    def play(self, seconds: float) -> None:
        self.connection.send(seconds)
        self.rounds = received(self.connection)

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()


# --- all rows of a work ---------------------------------------------------------------------------


class Turns:
    """The implementations of a work: checked in this process, and then timed."""

    def __init__(
        self,
        work: Work,
        names: Iterable[str],
        seconds: float,
        find: Callable[[], Work] | None = None,
    ):
        """Args: names of the implementations to be timed together, for so many seconds each;
        find makes the work anew, in processes of their own; None: in this one."""
        self.work, self.names, self.seconds, self.find = work, list(names), seconds, find
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
        self.checked(name)  # raises what its process could not do
        return self._rounds[name]

    def _time_all(self) -> dict[str, Rounds]:
        players = {}
        for name in self.names:
            try:
                self.checked(name)
                players[name] = self._player(name)
            except Exception as error:  # its own test tells
                self._checked[name] = error
        for _ in range(TURNS):
            for player in players.values():
                player.play(self.seconds / TURNS)
        for player in players.values():
            player.end()
        return {name: player.rounds for name, player in players.items()}

    def _player(self, name: str) -> Player | RemotePlayer:
        return RemotePlayer(self.find, name) if self.find else Player(self.work, name)


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
