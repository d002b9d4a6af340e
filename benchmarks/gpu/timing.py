"""How long a call takes, repeated over sets of arguments that no cache holds together.

Two times are taken of each call:

    call    calls back to back from Python: what a program waits for
    device  the same calls replayed from a CUDA graph: what the kernels take, without launching them
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .stand_in import STAND_IN

MOST_SETS = 512


class Clock:
    """CUDA events on the current stream."""

    burst, repetitions = (1e-4, 3) if STAND_IN else (4e-3, 7)  # burst: seconds between two events

    def __init__(self):
        properties = torch.cuda.get_device_properties(0)
        # Twice the second-level cache: nothing is left of a set when its turn comes again.
        self.rotation = 2 * getattr(properties, "L2_cache_size", 1 << 26)

    def seconds(self, run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def graph(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            warm_up()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


@dataclass(frozen=True)
class Times:
    """Seconds a call; note says why there is no device time. call: None where it was not wanted."""

    call: float | None
    device: float | None
    note: str = ""

    @property
    def best(self) -> float:
        return self.device or self.call


def sets_for(clock, bytes_of_a_set: int) -> int:
    """How many sets of arguments and results are larger together than the cache."""
    return max(2, min(-(-clock.rotation // bytes_of_a_set), MOST_SETS))


def measure(call: Callable, sets: list[tuple], clock, launches: bool = True) -> Times:
    """Medians of several bursts. Each set has a result of its own, kept until its next turn.

    Args: launches: whether the time of a call is wanted too, which takes as long again.
    """
    results, turns = [None] * len(sets), itertools.cycle(range(len(sets)))

    def calls(count):
        for i in itertools.islice(turns, count):
            results[i] = call(*sets[i])

    def median(run, once):
        count = max(1, min(int(clock.burst / once), 10_000))
        bursts = [clock.seconds(lambda: run(count)) for _ in range(clock.repetitions)]
        return statistics.median(bursts) / count

    def of_calls():
        return median(calls, clock.seconds(lambda: calls(3)) / 3)

    calls(len(sets))
    per_call = of_calls() if launches else None
    results[:] = [None] * len(sets)
    try:
        replay = clock.graph(lambda: calls(len(sets)), lambda: calls(1))
    except Exception as error:
        return Times(per_call or of_calls(), None, f"no graph: {type(error).__name__}")

    def replays(count):
        for _ in range(count):
            replay()

    replays(1)
    return Times(per_call, median(replays, clock.seconds(lambda: replays(1))) / len(sets))
