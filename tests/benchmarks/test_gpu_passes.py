"""How the stages of a GPU check take what a child says: rows, failures, variants that drop out."""

import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import failures, tune  # noqa: E402
from benchmarks.gpu.items import Done, Item  # noqa: E402
from benchmarks.gpu.passes import Measuring  # noqa: E402

FACTS = {"device": "Some GPU", "torch": "2", "CUDA": "13", "driver": "1", "date": "today"}


class Run:
    """Answers as it is told: {item's name: its error, or what its row gets}."""

    def __init__(self, items, answers, time=99):
        self.queue, self.answers, self.time = list(items), answers, time
        self.facts, self.total, self.broken, self.left_out = FACTS, len(items), "", []

    def __iter__(self):
        while self.queue and self.time:
            self.time -= 1
            item = self.queue.pop(0)
            given, answer = json.loads(json.dumps(self.given(item))), self.answers[item.name]
            error, ended = ("", False) if isinstance(answer, dict) else answer
            if not error:
                given.setdefault("row", {})["us"] = {**given["row"]["us"], **answer}
            yield Done(item, None if ended else given, error, ended)

    def not_run(self, optional=False):
        kinds = [item.kind for item in self.queue if item.optional == optional]
        return {kind: kinds.count(kind) for kind in kinds}


def part(work, name, compiles=False):
    row = {"op": "elementwise", "work": work, "variant": "noise made", "shape": [2, 4],
           "layout": "contiguous", "backward": False, "us": {}, "compile": "not tried"}  # fmt: skip
    about = {"work": work, "part": name, "compiles": compiles, **({} if compiles else {"row": row})}
    return Item(f"{work}: {name}", f"elementwise_{name}", 9, 1, about, compiles)


@pytest.fixture
def report(tmp_path):
    return lambda: json.loads((tmp_path / "some-gpu" / "tune.json").read_text())


def test_a_variant_that_fails_once_is_not_asked_again(tmp_path, report, capsys):
    names = ("as_it_is", "vectors_2", "grid_4")
    items = [part(work, name) for work in ("perturb", "step") for name in names]
    answers = {item.name: {item.about["part"]: 5} for item in items}
    answers["perturb: vectors_2"] = ("killed by SIGSEGV", True)
    measuring = tune.Tuning(Run(items, answers), tune.Tune, tmp_path)
    assert measuring.all() == 1
    found = report()
    assert [row["us"] for row in found["rows"]] == 2 * [{"as_it_is": 5, "grid_4": 5}]
    assert found["failures"] == [
        "FAILED elementwise_vectors_2: 1 of 1: killed by SIGSEGV (perturb: vectors_2)"
    ]
    assert not found["complete"]
    printed = capsys.readouterr().out
    assert printed.count("as it is 5.00 µs") == 2  # a line for each row
    assert printed.count(found["failures"][0]) == 1


def test_what_there_was_no_time_for_is_named(tmp_path, report):
    items = [part(work, "as_it_is") for work in ("one", "two", "three")]
    answers = {item.name: {"as_it_is": 5} for item in items}
    assert tune.Tuning(Run(items, answers, time=1), tune.Tune, tmp_path).all() == 1
    assert report()["failures"] == [
        "FAILED 2 of 3 items were not run", "FAILED not run: elementwise_as_it_is: 2",
    ]  # fmt: skip


def test_a_baseline_that_does_not_compile_is_no_failure(tmp_path, report):
    items = [part("step", "as_it_is"), part("step", "compiled", True), part("x", "more", True)]
    answers = {"step: as_it_is": {"as_it_is": 5}, "step: compiled": ("TimeoutError: x", False)}
    assert Measuring(Run(items, answers, time=2), tune.Tune, tmp_path).all() == 0
    found = report()
    assert found["complete"]
    assert found["rows"][0]["compile"] == "TimeoutError: x"


def test_what_was_begun_and_not_done_is_no_row(tmp_path, report):
    """Its baseline neither."""
    run = Run(
        [part("one", "as_it_is"), part("two", "as_it_is")], {"one: as_it_is": {"as_it_is": 5}}
    )
    measuring = Measuring(run, tune.Tune, tmp_path)
    run.answers["two: as_it_is"] = None
    with pytest.raises(TypeError):  # as an interrupt would, in the middle of the second
        measuring.all()
    assert [row["work"] for row in report()["rows"]] == ["one"]
    measuring.take(Done(part("two", "compiled", True), error="no row"))
    assert list(measuring.rows) == ["one"]


def test_rows_are_not_lost_to_an_error_of_the_report(tmp_path, report, monkeypatch):
    run = Run([part("one", "as_it_is")], {"one: as_it_is": {"as_it_is": 5}})
    monkeypatch.setattr(tune.winners.TuneReport, "winners", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Measuring(run, tune.Tune, tmp_path).all()
    found = report()
    assert [row["us"] for row in found["rows"]] == [{"as_it_is": 5}]
    assert found["failures"] == ["FAILED the report: ZeroDivisionError: division by zero"]


def test_equal_failures_are_one_line_the_worst_first():
    found = failures.Failures()
    for i in range(5):
        error = f"AssertionError: error {i}.5e-3 above 4e-06" if i < 3 else ""
        found.count(Done(Item(f"perturb {i}", "perturb"), error=error))
    found.count(Done(Item("step 1", "step"), error="hung for 8 s", ended=True))
    assert found.lines() == [
        "FAILED step: 1 of 1: hung for 8 s (step 1)",
        "FAILED perturb: 3 of 5: AssertionError: error 0.5e-3 above 4e-06 (perturb 0)",
    ]
