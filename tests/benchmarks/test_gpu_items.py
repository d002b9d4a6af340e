"""benchmarks/gpu/items.py: an item that crashes, hangs or breaks the GPU costs only itself."""

import os
import pathlib
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import items  # noqa: E402

TINY = [sys.executable, str(pathlib.Path(__file__).with_name("tiny_items.py"))]


def run(*names, seconds=30, prefix=(), heard=None, **options):
    """(the run, {name: what became of it} in the order in which they were done)"""
    run = items.Run([*prefix, *TINY, *names], seconds, **options)
    run.given = lambda item: {"given": item.kind}
    run.heard = heard or run.heard
    return run, {done.item.name: done for done in run}


def test_items_that_end_well_share_a_child():
    all_of_it, done = run("fine 0", "fine 1", "fine 2")
    assert list(done) == ["fine 0", "fine 1", "fine 2"]
    assert [one.result["done"] for one in done.values()] == [1, 2, 3]
    assert not any(one.error or one.ended for one in done.values())
    assert (all_of_it.facts, all_of_it.total) == ({"device": "tiny"}, 3)
    assert (all_of_it.statuses, all_of_it.not_run(), all_of_it.broken) == ([0], {}, "")


def test_an_item_that_raises_leaves_its_child_alone():
    """What it did until then comes back."""
    all_of_it, done = run("raises 0", "fine 0")
    raised = done["raises 0"]
    assert (raised.error, raised.ended) == ("ValueError: no such thing", False)
    assert (raised.result["given"], raised.result["done"]) == ("raises", 1)
    assert done["fine 0"].result["done"] == 2
    assert all_of_it.statuses == [0]


@pytest.mark.parametrize(
    "name, error",
    [
        ("crashes 0", "killed by SIGSEGV: about to crash"),
        ("exits 0", "ended, status 7"),
        ("hangs 0", "hung for 1 s"),
        ("faults 0", "RuntimeError: CUDA error: an illegal memory access"),
    ],
)
def test_an_item_that_ends_its_child_is_named_and_the_next_has_a_fresh_one(name, error):
    all_of_it, done = run("fine 0", name, "fine 1", "fine 2")
    assert (done[name].error, done[name].ended) == (error, True)
    assert done["fine 1"].result["done"] == 1
    assert done["fine 1"].result["pid"] != done["fine 0"].result["pid"]
    assert len(all_of_it.statuses) == 2  # a child that stood by did nothing


def test_what_python_can_interrupt_needs_no_fresh_child():
    _, done = run("sleeps 0", "fine 0")
    assert (done["sleeps 0"].error, done["sleeps 0"].ended) == (
        "OutOfTime: took too long", False,
    )  # fmt: skip
    assert done["fine 0"].result["done"] == 2


def test_a_kind_that_ends_children_is_put_off_and_then_left_out():
    names = [f"exits {i}" for i in range(8)] + ["fine 0", "fine 1"]
    all_of_it, done = run(*names)
    assert list(done) == ["exits 0", "exits 1", "fine 0", "fine 1", "exits 2", "exits 3"]
    assert all_of_it.not_run() == {"exits": 4}
    one, done = run(*names, most_ends=1)
    assert list(done) == ["exits 0", "fine 0", "fine 1"]
    assert one.not_run() == {"exits": 7}


def test_no_child_is_left():
    names = ["exits 0", "fine 0", *(f"raises {i}" for i in range(4)), "crashes 0", "fine 1"]
    _, done = run(*names)
    assert done["fine 1"].result["done"] == 1
    pids = {one.result["pid"] for one in done.values() if one.result}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_the_time_was_too_short_for_is_counted():
    start = time.monotonic()
    names = ["fine 0", *(f"hangs {i}" for i in range(3)), "other 0", "late 0"]
    all_of_it, done = run(*names, seconds=1.8)
    assert time.monotonic() - start < 10
    assert "fine 0" in done
    assert sum(all_of_it.not_run().values()) == 5 - len(done) > 0
    assert all_of_it.not_run(optional=True) == {"late": 1}


def test_who_iterates_may_take_items_out():
    all_of_it = items.Run([*TINY, "fine 0", "fine 1", "other 0"], 30)
    done = []
    for one in all_of_it:
        done.append(one.item.name)
        all_of_it.drop("fine")
    assert done == ["fine 0", "other 0"]
    assert all_of_it.not_run() == {"fine": 1}


def test_a_child_that_does_not_start():
    all_of_it, done = run("unready 0")
    assert done == {}
    assert all_of_it.broken == "no child starts: ended, status 1: OSError: nothing here"


def test_a_command_may_stand_before_python():
    """As compute-sanitizer does, whose exit status then says what it found."""
    around = ["bash", "-c", '"$@"; echo "=== ERROR"; exit 86', "around"]
    heard = []

    def hear(line, item):
        heard.append((line.strip(), item.name))

    all_of_it, done = run("fine 0", "exits 0", "fine 1", prefix=around, heard=hear)
    assert (done["fine 0"].error, done["exits 0"].error) == ("", "ended, status 86: === ERROR")
    assert all_of_it.statuses == [86, 86]
    assert ("=== ERROR", "exits 0") in heard


def test_kinds_are_said_those_with_the_most_first():
    kinds = {f"kind {i}": i + 1 for i in range(14)}
    lines = items.said_of(kinds)
    assert (lines[0], len(lines)) == ("kind 13: 14", 13)
    assert lines[-1] == "2 more kinds: 3"
