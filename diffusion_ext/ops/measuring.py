"""Ways to do the same, timed in turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

ROUNDS, FEWEST = 5, 2  # in which each way has a turn; where there is little time
CALLS = 20  # of a turn, at most
ALL_ROUNDS = 10.0  # seconds after which no round begins, beyond FEWEST
# Seconds after which no other way is tried; or so many calls of the first way, where that is more.
TRYING, CALLS_OF_FIRST = 20.0, 10
RIVAL = 2.0  # times the least of all: what takes longer could not have been taken
# More than this leaves a doubt: what the two best turns of a way differ by, and how long the caller
# had no core, as shares.
SPREAD, WAITED = 0.25, 0.1

Calls = Iterator[Callable[[], object]]


@dataclass(frozen=True)
class Measured:
    """What was measured, and how.

    Attributes:
        seconds: way -> of one call, the least of all.
        failed: way -> why it was not timed.
        when: it began, in seconds since 1970. took: seconds, all in all.
        rounds: in which each way had a turn.
        spread: what the two best turns of a way differ by, as a share of the best; the largest of
            the ways that could have been taken.
        waited: share of the rounds in which the caller was ready and had no core; 0 where the
            system (one that is not Linux) does not tell.
    """

    seconds: dict[str, float]
    failed: dict[str, str]
    when: float
    took: float
    rounds: int
    spread: float
    waited: float

    @property
    def doubt(self) -> str:
        """Why it may be wrong; "" where nothing speaks against it."""
        doubts = []
        if self.waited > WAITED:
            doubts.append(f"other programs had the core for {self.waited:.0%} of the time")
        if self.spread > SPREAD:
            doubts.append(f"turns of one way differ by {self.spread:.0%}")
        return " and ".join(doubts)


def measure(
    ways: Mapping[str, Callable[[], Calls]],
    device: torch.device,
    turn: float,
    trying: Callable[[str], object] = lambda way: None,
) -> Measured:
    """Times the ways, one turn each in every round.

    Args:
        ways: name -> what makes the way's calls, of which there are as many as are wanted. What
            takes long to make comes last: it is left out where there is no time for it.
        turn: seconds of a turn. trying: is told of each way that is tried.

    Raises: what the first way raises. Of another one that is told in `failed`.
    """
    when, start = time.time(), time.perf_counter()
    calls, failed = _first_calls(ways, device, trying)
    began, before = time.perf_counter(), waited()
    turns: dict[str, list[float]] = {way: [] for way in calls}
    rounds = 0
    while rounds < FEWEST or (rounds < ROUNDS and time.perf_counter() - began < ALL_ROUNDS):
        rounds += 1
        for way in list(turns):
            with _telling(failed, way, unless=way == next(iter(ways))):
                turns[way].append(_turn(calls[way], turn, device))
            if way in failed:
                del turns[way]
    end = time.perf_counter()
    least = {way: min(times) for way, times in turns.items()}
    rivals = [way for way in least if least[way] <= RIVAL * min(least.values())]
    spread = max(sorted(turns[way])[1] / least[way] - 1 for way in rivals)
    share = (waited() - before) / (end - began)
    return Measured(least, failed, when, end - start, rounds, spread, share)


def _first_calls(ways, device, trying) -> tuple[dict[str, Calls], dict[str, str]]:
    """Each way's calls after a first one, which makes what later ones keep; and what failed."""
    start, limit = time.perf_counter(), TRYING
    calls: dict[str, Calls] = {}
    failed: dict[str, str] = {}
    for way, make in ways.items():
        if time.perf_counter() - start > limit:
            failed[way] = f"not tried after {limit:.0f} s"
            continue
        trying(way)
        with _telling(failed, way, unless=not calls):
            made = make()
            first = seconds(next(made), device)
            if not calls:
                limit = max(limit, CALLS_OF_FIRST * first)
            calls[way] = made
    return calls, failed


@contextlib.contextmanager
def _telling(failed: dict[str, str], way: str, unless: bool):
    """An error is noted, unless it is to be raised."""
    try:
        yield
    except Exception as error:
        if unless:
            raise
        failed[way] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _turn(calls: Calls, turn: float, device: torch.device) -> float:
    """Seconds of a call, the least of a turn."""
    times: list[float] = []
    while not times or (len(times) < CALLS and sum(times) < turn):
        times.append(seconds(next(calls), device))
    return min(times)


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


def waited() -> float:
    """Seconds for which this thread has been ready to run and had no core; 0 where that is not
    known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = pathlib.Path("/proc/thread-self/schedstat").read_text(encoding="utf-8")
        return int(told.split()[1]) / 1e9
    return 0.0
