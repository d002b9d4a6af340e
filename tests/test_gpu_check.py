"""benchmarks/gpu_check.py with the CPU standing in for the GPU: every stage, in small."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import sampling_report as report  # noqa: E402


def gpu_check(*arguments, **environment):
    """(exit status, what it printed)"""
    knobs = ("GPU_CHECK", "GPU_CHECK_DEVICE", "PYTEST_ADDOPTS", "DIFFUSION_EXT_BACKEND")
    clean = {name: value for name, value in os.environ.items() if name not in knobs}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *map(str, arguments)],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def results_of(printed):
    """{"stage: step": result} as the summary has them."""
    _, _, table = printed.rpartition("\nstage ")
    lines = re.findall(r"^(\w+) +(\S.*?) {2,}(?:\d+ +\d+ +)?(\w.*)$", table, re.M)
    return {f"{stage}: {step}": result for stage, step, result in lines if stage != "stage"}


STEPS = (
    "build: compile",
    "build: load",
    "test: tests/ops",
    "test: engines",
    "sanitize: without a tool",
    "bench: ops",
    "sample: runs",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    status, printed = gpu_check("--results", folder)
    assert status == 0, printed
    return folder, printed


def test_every_stage_runs(whole):
    _, printed = whole
    assert results_of(printed) == dict.fromkeys(STEPS, "passed")
    assert re.search(r"\d+ passed", printed)
    assert re.search(r"\d+ calls on cpu", printed)


def test_the_results_are_complete(whole):
    folder, _ = whole
    (device,) = folder.iterdir()
    names = ["ops.json", "ops.md", "sampling.json", "sampling.md"]
    assert sorted(path.name for path in device.iterdir()) == names
    data = json.loads((device / "ops.json").read_text())
    assert data["complete"]
    assert {"device", "torch", "CUDA", "driver", "date"} <= set(data)
    works = {(row["op"], row["variant"]) for row in data["rows"]}
    assert {op for op, _ in works} == {"sampler_step", "perturb", "philox_normal", "group_norm_act"}
    assert len(works) == 9
    for row in data["rows"]:
        assert "error" not in row, row
        for times in (row["device_us"], row["call_us"]):
            assert {"copy", "fused", "eager"} <= set(times)
            assert min(times.values()) > 0
        assert ("plan" in row) == (row["op"] == "group_norm_act")
    assert sum(row["compile"] == "compiled" for row in data["rows"]) == 1
    assert all(target["met"] <= target["rows"] for target in data["targets"])
    text = (device / "ops.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert sum(table.count("\n") - 2 for table in tables[2:]) == len(data["rows"])
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "Incomplete" not in text


def test_the_sampling_runs_are_complete(whole):
    folder, _ = whole
    (device,) = folder.iterdir()
    data = json.loads((device / "sampling.json").read_text())
    assert data["complete"]
    assert data["targets"] == []  # which are about a graph
    assert {(row["sampler"], row["dtype"]) for row in data["rows"]} == set(
        itertools.product(("DDIM, 2 steps", "DDPM, 3 steps"), ("float32", "bfloat16"))
    )
    for row in data["rows"]:
        assert "failed" not in row, row
        assert {"source", "ours", "ours, optimized"} <= set(row["seconds"])
        assert set(row["missing"]) == {"ours, graph", "ours, optimized, graph"}
        assert min(row["seconds"].values()) > 0
        assert set(row["error"]) == set(row["seconds"]) - {"source"}
    assert sum(row["compile"] == "compiled" for row in data["rows"]) == 1
    text = (device / "sampling.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_sampling_targets():
    def row(source, ours, **more):
        return {"seconds": {report.SOURCE: source, report.BEST: ours, **more}}

    rows = [row(4.0, 1.0), row(2.0, 1.0), {"seconds": {}, "failed": "an error"}]
    (found,) = report.targets(rows)
    assert (found["rows"], found["met"], found["worst"]) == (2, 1, 2.0)
    rows.append(row(4.0, 1.0, **{report.COMPILED: 1.2}))
    assert [target["met"] for target in report.targets(rows)] == [2, 0]


def test_a_stage_that_fails_does_not_stop_the_next(whole, tmp_path):
    status, printed = gpu_check(
        "--results", tmp_path, GPU_CHECK="sanitize,test", PYTEST_ADDOPTS="--no-such-option"
    )
    assert status == 1
    steps = dict.fromkeys(("test: tests/ops", "test: engines"), "failed (status 4)")
    steps["sanitize: without a tool"] = "passed"
    assert results_of(printed) == steps


def test_a_stage_that_outlasts_its_limit(whole, tmp_path):
    status, printed = gpu_check("--results", tmp_path, "--seconds", 0.5, GPU_CHECK="test,sanitize")
    assert status == 1
    assert results_of(printed)["test: tests/ops"] == "timed out"


def test_a_stage_that_does_not_exist(tmp_path):
    status, printed = gpu_check("--results", tmp_path, GPU_CHECK="tset")
    assert status == 1
    assert "GPU_CHECK: wanted some of build,test,sanitize,bench,sample, got tset" in printed


def test_nothing_runs_without_a_build(tmp_path):
    """The rest of the logic, on steps that take a moment."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu_check as script
    finally:
        sys.path.pop(0)

    def step(name, code, **options):
        return script.Step("stage", name, [sys.executable, "-c", code], 1, **options)

    fails = step("fails", "raise SystemExit(3)", needed=True)
    skipped = step("skipped", "", skipped="not installed")
    outcomes = script.run_all([skipped, fails, step("next", "")], 60)
    assert [outcome.result for outcome in outcomes] == [
        "skipped (not installed)",
        "failed (status 3)",
        "not run (stage: fails failed (status 3))",
    ]
    assert [outcome.good for outcome in outcomes] == [True, False, False]
    missing = script.Step("stage", "missing", [str(tmp_path / "missing")], 1)
    assert script.run_all([missing], 60)[0].result.startswith("failed (")
