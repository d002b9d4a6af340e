"""Times a work whose networks are too large to be there together: eager, and one other at a time.

Each is checked in its own process, against float64 results that came from a process of their own.
The other rows take turns with eager one after the other, so that a ratio to eager is of one time,
and a ratio between two of them is of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from .turns import Player, RemotePlayer, Rounds, forked, received, seeded, serve_rounds
from .work import Check, Work

PATIENCE = 1800  # seconds for a process to be ready: a cold compilation of 860 M parameters
TURNS = 3  # of each pair


def serve_exact(connection, find: Callable[[], Work]) -> None:
    """Sends the float64 results, as arrays: a tensor's memory would end with this process."""
    work = find()
    connection.send([t.numpy() for t in Check(work, seeded(work)).exact()])


def serve(connection, find: Callable[[], Work], name: str, exact: list[np.ndarray]) -> None:
    """Sends the error of its result, or what the check or the row raises; then as turns.serve."""
    try:
        work = find()
        implementation, player = work.implementations[name], Player(work, name)
        with implementation.around():
            check = Check(work, player.inputs, tuple(map(torch.from_numpy, exact)))
            error = check.error_of(implementation, lambda *_: player.call())
    except Exception as failure:  # told as text: not every error can be sent
        connection.send(AssertionError(f"{type(failure).__name__}: {failure}"))
        return
    connection.send(error)
    serve_rounds(connection, player)


class CheckedPlayer(RemotePlayer):
    """A row in a process of its own. Attributes: error: of its result."""

    def __init__(self, find: Callable[[], Work], name: str, exact: list[np.ndarray]):
        self.process, self.connection = forked(serve, find, name, exact)
        self.rounds = Rounds()
        self.error = received(self.connection, PATIENCE)
        if isinstance(self.error, Exception):
            self.process.join()
            raise self.error


class Apart:
    """The implementations of a work, as turns.Turns has them, of which none is in this process.

    Args: names of the implementations to be timed, for so many seconds each; find makes the work
    anew, in processes of their own.
    """

    def __init__(self, names: Iterable[str], seconds: float, find: Callable[[], Work]):
        self.names, self.seconds, self.find = list(names), seconds, find
        self._found: dict[str, tuple[float, Rounds] | Exception] = {}

    def checked(self, name: str) -> tuple[Callable, float | None]:
        """(a call without arguments, which does nothing; the error of the row's result)"""
        return (lambda: None), self._of(name)[0]

    def rounds(self, name: str) -> Rounds:
        return self._of(name)[1]

    def _of(self, name: str) -> tuple[float, Rounds]:
        """Raises: what the row could not do."""
        if not self._found:
            self._time_all()
        found = self._found[name]
        if isinstance(found, Exception):
            raise found
        return found

    def _time_all(self) -> None:
        process, connection = forked(serve_exact, self.find)
        exact = received(connection, PATIENCE)
        process.join()
        first, *others = sorted(self.names, key=lambda name: name != "eager")
        always = self._player(first, exact)
        for name in others:
            if player := self._player(name, exact):
                self._play([p for p in (always, player) if p], self.seconds)
                self._found[name] = player.error, player.rounds
                player.end()
        if always:
            if not always.rounds.seconds:  # none took turns with it
                self._play([always], self.seconds)
            self._found[first] = always.error, always.rounds
            always.end()

    def _player(self, name: str, exact: list[np.ndarray]) -> CheckedPlayer | None:
        try:
            return CheckedPlayer(self.find, name, exact)
        except Exception as error:  # its own test tells
            self._found[name] = error
            return None

    def _play(self, players: list[CheckedPlayer], seconds: float) -> None:
        for _ in range(TURNS):
            for player in players:
                player.play(seconds / TURNS)
