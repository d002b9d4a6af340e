"""`bench`: which ways take turns together, and which are left out, by time, memory and kind."""

import re
import time
from typing import ClassVar

import numpy as np
import pytest

from diffusion_ext.app.bench import turns
from diffusion_ext.app.bench.report import Result
from diffusion_ext.app.bench.subject import Request, refusal
from diffusion_ext.app.bench.turns import GIB, Way, measured
from diffusion_ext.app.bench.worker import Ready


class Silent:
    """A process that does not answer."""

    def __init__(self, request):
        self.connection = self

    def poll(self, seconds):
        return False

    def end(self):
        pass


def test_a_way_that_takes_too_long_to_be_ready_is_left_out(monkeypatch):
    monkeypatch.setattr(turns, "Process", Silent)
    ways, processes = {"openvino": Way("openvino")}, {}
    until = time.perf_counter() + 0.05
    turns._make_ready(ways, processes, Request("x", "eager"), ("openvino",), until)
    assert processes == {}
    assert re.fullmatch(r"not ready in \d s, --seconds gives it longer", ways["openvino"].failure)


def test_what_a_runtime_cannot_run():
    assert refusal(Request("x", "eager", dtype="bfloat16"), "openvino") == (
        "wants float32 on a CPU, not bfloat16 on cpu"
    )
    assert refusal(Request("x", "eager", device="cuda"), "onnxruntime") == (
        "wants float32 on a CPU, not float32 on cuda"
    )
    assert refusal(Request("x", "eager", dtype="bfloat16"), "compile") == ""


class Answering:
    """A way's process that is ready at once and counts who else is."""

    alive: ClassVar[set] = set()
    seen: ClassVar[list] = []

    def __init__(self, request):
        self.way, self.connection = request.way, self
        self.alive.add(self.way)

    def poll(self, seconds):
        return True

    def received(self):
        return Ready("Net", (1, 3, 8, 8), [], [], [("network", 1)], [np.ones(1)], 1.0, GIB)

    def timed(self, part, seconds):
        self.seen.append((self.way, len(self.alive)))
        return [1.0]

    def end(self):
        self.alive.discard(self.way)


@pytest.mark.parametrize("at_once", [5, 2, 1])
def test_ways_that_do_not_fit_in_memory_together_take_turns_in_groups(at_once, monkeypatch):
    Answering.alive.clear()
    Answering.seen.clear()
    monkeypatch.setattr(turns, "Process", Answering)
    monkeypatch.setattr(turns, "refusal", lambda request, name: "")

    def memory_available():
        return 10 * GIB if len(Answering.alive) < at_once else 0

    monkeypatch.setattr(turns, "memory_available", memory_available)
    ways = measured(Request("x", "eager"), seconds=100)
    assert not Answering.alive
    if at_once == 1:  # eager and ours need two
        assert ways["openvino"].failure == "wants about 2.5 GiB of memory, 0.0 are free"
        return
    assert all(way.times for way in ways.values())
    assert max(count for _, count in Answering.seen) == at_once
    timed = [w for w, _ in Answering.seen]
    groups = {name: of.group for name, of in ways.items() if name != "eager"}
    assert groups == (
        dict.fromkeys(groups, 0) if at_once == 5
        else {"ours": 0, "openvino": 1, "onnxruntime": 2, "compile": 3}
    )  # fmt: skip
    assert timed.count("eager") == timed.count("ours") * (1 + max(groups.values()))
    said = (
        "Memory was short for all at once: eager took turns with diffusion_ext; then with OpenVINO"
    )
    assert (said in "\n".join(Result(Request("x", "eager"), ways).notes())) == (at_once == 2)
