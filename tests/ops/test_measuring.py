"""Ways timed in turns, on a clock that the tests set."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffusion_ext.ops import measuring

CPU = torch.device("cpu")


class Clock:
    """Calls are the seconds that they take."""

    def __init__(self, monkeypatch, core: float = 1.0):
        self.now, self.core, self.log = 0.0, core, []
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(measuring, "waited", lambda: (1 - core) * self.now)

    def way(self, name, *seconds, making=0.0):
        """A maker of calls: the first one, then as told, the last one for ever."""

        def make():
            self.now += making
            return calls()

        def calls():
            for s in itertools.chain(seconds, itertools.repeat(seconds[-1])):
                yield lambda s=s: self.take(name, s)

        return make

    def take(self, name, seconds):
        self.now += seconds
        self.log.append(name)


def test_in_turns(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"a": clock.way("a", 9.0, 0.06), "b": clock.way("b", 9.0, 0.2)}
    found = measuring.measure(ways, CPU, 0.1)
    assert clock.log == ["a", "b", *["a", "a", "b"] * measuring.ROUNDS]
    assert found.seconds == pytest.approx({"a": 0.06, "b": 0.2})  # the first call does not count
    assert (found.failed, found.rounds, found.doubt) == ({}, measuring.ROUNDS, "")
    assert found.took == pytest.approx(18 + measuring.ROUNDS * 0.32)


def test_a_turn_has_so_many_calls_at_most(monkeypatch):
    clock = Clock(monkeypatch)
    measuring.measure({"a": clock.way("a", 1e-6)}, CPU, 0.1)
    assert len(clock.log) == 1 + measuring.ROUNDS * measuring.CALLS


def test_slow_ways_have_fewer_rounds(monkeypatch):
    clock = Clock(monkeypatch)
    found = measuring.measure({"a": clock.way("a", 20.0)}, CPU, 0.1)
    assert found.rounds == measuring.FEWEST == len(clock.log) - 1


@pytest.mark.parametrize(("slow", "doubt"), [(0.12, ""), (0.2, "turns of one way differ by 100%")])
def test_turns_that_disagree(monkeypatch, slow, doubt):
    """A load that comes after the first round: its best turn stands alone."""
    clock = Clock(monkeypatch)
    found = measuring.measure({"a": clock.way("a", 1.0, 0.1, slow)}, CPU, 0.1)
    assert found.seconds["a"] == pytest.approx(0.1)
    assert found.spread == pytest.approx(slow / 0.1 - 1)
    assert found.doubt == doubt


def test_a_way_that_could_not_be_taken_leaves_no_doubt(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {"a": clock.way("a", 0.1), "b": clock.way("b", 9.0, 0.3, 0.9)}
    found = measuring.measure(ways, CPU, 0.1)
    assert found.seconds["b"] == pytest.approx(0.3)
    assert (found.spread, found.doubt) == (pytest.approx(0), "")


@pytest.mark.parametrize(
    ("core", "doubt"), [(0.95, ""), (0.5, "other programs had the core for 50% of the time")]
)
def test_a_machine_that_is_busy(monkeypatch, core, doubt):
    """Turns may agree there: each takes a hundred times as long."""
    found = measuring.measure({"a": Clock(monkeypatch, core).way("a", 8.0)}, CPU, 0.1)
    assert found.waited == pytest.approx(1 - core)
    assert (found.spread, found.doubt) == (pytest.approx(0), doubt)


def test_no_way_is_tried_after_a_time(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {
        "a": clock.way("a", 0.1),
        "b": clock.way("b", 0.1, making=measuring.TRYING),
        "c": clock.way("c", 0.01),
    }
    tried = []
    found = measuring.measure(ways, CPU, 0.1, tried.append)
    assert tried == ["a", "b"] == list(found.seconds)
    assert found.failed == {"c": "not tried after 20 s"}


def test_a_slow_model_has_more_time(monkeypatch):
    clock = Clock(monkeypatch)
    ways = {name: clock.way(name, 15.0) for name in "abc"}
    assert list(measuring.measure(ways, CPU, 0.1).seconds) == ["a", "b", "c"]


@pytest.mark.parametrize("at", [1, 2, 4])  # at its first call, in the first round, in a later one
def test_errors(monkeypatch, at):
    clock = Clock(monkeypatch)

    def fails():
        yield from (lambda: clock.take("b", 0.2) for _ in range(at - 1))
        raise RuntimeError("no such op\nand more")

    found = measuring.measure({"a": clock.way("a", 0.1), "b": fails}, CPU, 0.1)
    assert list(found.seconds) == ["a"]
    assert found.failed == {"b": "RuntimeError: no such op"}
    with pytest.raises(RuntimeError, match="no such op"):
        measuring.measure({"b": fails, "a": clock.way("a", 0.1)}, CPU, 0.1)


def test_the_clock_as_it_is():
    calls = []
    assert 0 <= measuring.seconds(lambda: calls.append(1), CPU) < 10
    assert calls == [1]
    assert 0 <= measuring.waited() <= measuring.waited()
