"""How the suite runs: a test is a row, one implementation of one work.

DIFFUSION_EXT_BENCH_QUICK=1, or pytest's --benchmark-disable: small tensors, one compilation.
DIFFUSION_EXT_BENCH_DEVICE=cpu or cuda: default the GPU, where there is one.
"""

from __future__ import annotations

import functools
import os

import pytest

from . import suite
from .apart import Apart
from .device import facts
from .turns import Turns, replay
from .work import Work


def is_quick(config) -> bool:
    disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    return disabled or os.environ.get("DIFFUSION_EXT_BENCH_QUICK") == "1"


def test_of(function) -> str:
    return function.__name__.removeprefix("test_")


def row_id(work: Work, name: str) -> str:
    return f"{work.name}: {name}"


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(
            work,
            name,
            id=row_id(work, name),
            marks=[pytest.mark.compiles] if work.implementations[name].compiles else [],
        )
        for work, name in suite.rows(test_of(metafunc.function), is_quick(metafunc.config))
    ]
    metafunc.parametrize("work, implementation", parameters)


@functools.lru_cache(maxsize=1)  # the rows of a work come one after the other
def turns_of(work: Work, test: str, session) -> Turns | Apart:
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    asked = [p["implementation"] for p in parameters if p.get("work") is work]
    names = [name for name in asked if not work.implementations[name].missing]
    seconds = float(session.config.getoption("benchmark_max_time"))
    # A GPU's memory has an allocator of its own, and a process there takes seconds to begin.
    alone = work.case.device == "cpu"
    find = (
        functools.partial(suite.find, test, work.name, is_quick(session.config)) if alone else None
    )
    if work.apart and find:
        return Apart(names, seconds, find)
    return Turns(work, names, seconds, find)


@pytest.fixture
def measure(benchmark, request):
    """measure(work, implementation): checks its result, then times it."""

    def run(work: Work, name: str) -> None:
        if missing := work.implementations[name].missing:
            pytest.skip(f"wants {missing}")
        turns = turns_of(work, test_of(request.function), request.session)
        call, error = turns.checked(name)
        benchmark.group = work.name
        benchmark.extra_info = {
            "op": work.op,
            "variant": work.variant,
            "shape": list(work.case.shape),
            "dtype": work.case.dtype,
            "layout": work.case.layout,
            "implementation": name,
            "baseline": work.baseline,
            "bytes": work.bytes,
            "copied_bytes": 2 * work.case.bytes,
            "max_error": error,
        }
        if benchmark.enabled:
            benchmark.pedantic(int, **replay.of(turns.rounds(name)))
        else:
            benchmark(call)

    return run


# --- the JSON file --------------------------------------------------------------------------------

ASKED = pytest.StashKey[set[str]]()


def pytest_collection_finish(session):
    session.config.stash[ASKED] = {item.name for item in session.items}


def left_out(asked: set[str]) -> list[str]:
    """The rows of `make bench` that a run was not asked for."""
    whole = {
        f"test_{test}[{row_id(work, name)}]"
        for test in suite.TESTS
        for work, name in suite.rows(test, quick=False)
    }
    return sorted(whole - asked)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.update(facts(suite.DEVICE))
    machine_info["node"] = ""  # the host's name says nothing


def pytest_benchmark_update_json(config, output_json):
    """Adds what only the whole run knows, and drops what is long and not read."""
    rows = output_json["benchmarks"]
    output_json["left_out"] = left_out(config.stash[ASKED])
    copies = {row["group"]: row for row in rows if row["extra_info"]["implementation"] == "copy"}
    for row in rows:
        row["params"] = row["stats"]["data"] = None
        info = row["extra_info"]
        info["gb_per_s"] = info["bytes"] / row["stats"]["min"] / 1e9
        if copy := copies.get(row["group"]):
            copied = info["copied_bytes"] / copy["stats"]["min"] / 1e9
            info["percent_of_copy"] = 100 * info["gb_per_s"] / copied
