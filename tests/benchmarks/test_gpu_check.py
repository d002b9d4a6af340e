"""benchmarks/gpu_check.py on the stand-in for a GPU: both calls, in small, and with faults."""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from test_build import OBJECTS

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks.gpu import diffusion_models as networks  # noqa: E402
from benchmarks.gpu import running  # noqa: E402
from benchmarks.gpu import sampling_report as report  # noqa: E402


def gpu_check(*arguments, **environment):
    """(exit status, what it printed)"""
    knobs = ("GPU_CHECK", "PYTEST_ADDOPTS", "DIFFUSION_EXT_BACKEND")
    clean = {name: value for name, value in os.environ.items() if name not in knobs}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--stand-in", *map(str, arguments)],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def results_of(printed):
    """{"stage: step": result} as the summary of the last call has them."""
    _, _, table = printed.rpartition("| stage |")
    lines = re.findall(r"^\| (\w+) \| (.*?) \| \d+ \| \d+ \| (.*?) \| .*\|$", table, re.M)
    return {f"{stage}: {step}": result for stage, step, result in lines}


STEPS = {
    "first": (
        "build: compile",
        "build: emulated kernels",
        "build: load",
        "variants: variants",
        "smoke: smoke",
        "bench: bench",
        "tune: tune",
    ),
    "second": (
        "build: compile",
        "build: emulated kernels",
        "build: load",
        "test: tests/ops",
        "test: large samples",
        "test: other rooms",
        "sanitize: memcheck",
        "sanitize: racecheck",
        "sanitize: initcheck",
        "sanitize: synccheck",
        "sample: diffusion_models",
        "sample: sampling",
        "bench: bench",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a folder with one of each call's results, {call: what it printed})"""
    folder, printed = tmp_path_factory.mktemp("results"), {}
    for call in STEPS:
        with OBJECTS:
            status, printed[call] = gpu_check(
                "--call", call, "--results", folder / call, "--seconds", 900
            )
        assert status == 0, printed[call]
    return folder, printed


def test_every_stage_runs(whole):
    _, printed = whole
    for call, steps in STEPS.items():
        results = results_of(printed[call])
        results.pop("build: wheels", None)  # where there are any
        assert results == dict.fromkeys(steps, "passed")
    assert re.search(r"(\d+) of \1 checks passed", printed["first"])
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert re.search(rf"{tool}: (\d+) of \1 calls watched", printed["second"])


def test_what_a_call_leaves(whole):
    """At most eight files, all that was printed, and a summary of under 100 lines."""
    folder, printed = whole
    for call in STEPS:
        assert len([path for path in (folder / call).rglob("*") if path.is_file()]) <= 8
        summary = (folder / call / f"{call}.md").read_text()
        assert summary.count("\n") < 100
        assert printed[call].rstrip().endswith(summary.rstrip())
        assert "=== " in (folder / call / f"{call}.log").read_text()
    assert "missed in" in (folder / "first" / "first.md").read_text()  # it is no H200


def test_the_results_are_complete(whole):
    folder, _ = whole
    (device,) = (path for path in (folder / "first").iterdir() if path.is_dir())
    data = json.loads((device / "ops.json").read_text())
    assert data["complete"]
    assert {"device", "torch", "CUDA", "driver", "date"} <= set(data)
    works = {(row["op"], row["variant"]) for row in data["rows"]}
    assert {op for op, _ in works} == {
        "sampler_step", "perturb", "denoising_loss", "philox_normal", "group_norm_act",
    }  # fmt: skip
    assert len(works) == 11
    for row in data["rows"]:
        assert "error" not in row, row
        for times in (row["device_us"], row["call_us"]):
            assert {"copy", "fused", "eager"} <= set(times)
            assert min(times.values()) > 0
        assert ("plan" in row) == (row["op"] == "group_norm_act")
    assert {row["dtype"] for row in data["rows"]} == {"bfloat16"}
    assert sum(row["compile"] == "compiled" for row in data["rows"]) == 1
    text = (device / "ops.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert sum(table.count("\n") - 2 for table in tables[2:]) == len(data["rows"])
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "Incomplete" not in text


def test_the_sampling_runs_are_complete(whole):
    folder, _ = whole
    (device,) = (path for path in (folder / "second").iterdir() if path.is_dir())
    data = json.loads((device / "sampling.json").read_text())
    assert data["complete"]
    assert {(row["sampler"], row["dtype"]) for row in data["rows"]} == set(
        itertools.product(("DDIM, 2 steps", "DDPM, 3 steps"), ("float32", "bfloat16"))
    )
    for row in data["rows"]:
        assert "failed" not in row, row
        assert {"source", "ours", "ours, optimized, graph"} <= set(row["seconds"])
        assert min(row["seconds"].values()) > 0
        assert set(row["error"]) == set(row["seconds"]) - {"source"}
    assert sum(row["compile"] == "compiled" for row in data["rows"]) == 1
    text = (device / "sampling.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_networks_are_measured(whole):
    pytest.importorskip("diffusers")
    folder, _ = whole
    data = json.loads(next(folder.glob("second/*/networks.json")).read_text())
    assert data["complete"]
    assert len(data["rows"]) == 2
    for row in data["rows"]:
        assert row["compile"] == "compiled"
        assert set(row["off"]) == set(row["ms"]) == set(networks.WAYS)
        assert min(row["ms"].values()) > 0
    assert len(data["summary"]) == 4


def test_a_gain_is_over_the_faster_eager_network():
    ms = {networks.PLAIN: 3.0, networks.EAGER: 4.0, networks.FUSED: 2.0}
    assert networks.gains(ms) == [(networks.FUSED, networks.PLAIN, 1.5)]
    ms |= {networks.EAGER: 1.0, networks.COMPILED: 5.0, networks.BOTH: 2.0}
    assert networks.gains(ms) == [
        (networks.FUSED, networks.EAGER, 0.5),
        (networks.BOTH, networks.COMPILED, 2.5),
    ]
    assert networks.gains({networks.FUSED: 1.0}) == []


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
        "--call", "second", "--results", tmp_path, GPU_CHECK="bench,test",
        PYTEST_ADDOPTS="--no-such-option",
    )  # fmt: skip
    assert status == 1
    results = results_of(printed)
    tests = {result for step, result in results.items() if step.startswith("test: ")}
    assert tests == {"failed (status 4)"}
    assert results["bench: bench"] == "passed"
    first = printed.rpartition("# The second call")[2].split("\n")[2]
    assert first.startswith("* **test: tests/ops failed (status 4)** ")
    assert "--no-such-option" in first


def red(folder, call, stage, planted):
    """What a stage of a call prints, which fails, with a fault planted in the stand-in."""
    status, printed = gpu_check(
        "--call", call, "--results", folder, "--seconds", 400, GPU_CHECK=stage,
        STAND_IN_PLANTED=planted,
    )  # fmt: skip
    assert status == 1
    return printed


def test_a_kernel_that_ends_its_process(whole, tmp_path):
    """Costs the checks of its own kinds; the summary names them, and what happened."""
    printed = red(tmp_path, "first", "smoke", "crash:philox_normal_")
    summary = printed.rpartition("# The first call")[2]
    named = re.findall(r"^    \* (?:not run: )?(.*)", summary, re.M)
    crashed = [line for line in named if "killed by SIGSEGV" in line]
    assert len(crashed) == 3  # beside the reference, and in two layouts beside the CPU
    others = [line for line in named if not line.startswith("philox_normal")]
    assert [re.sub(r"\d+", "n", line) for line in others] in ([], ["n of n items were not run"])
    passed, total = map(int, re.search(r"(\d+) of (\d+) checks passed", printed).groups())
    assert 0.9 * total < passed < total


def test_a_fault_in_the_tests_of_the_ops(whole, tmp_path):
    """Ends a worker process, which the summary names by its test; the others go on."""
    printed = red(tmp_path, "second", "test", "fault:philox_normal_")
    assert results_of(printed)["test: tests/ops"].startswith("failed")
    assert "test_the_chosen_backend_serves" in printed.rpartition("# The second call")[2]
    passed = re.search(r"(\d+) failed, (\d+) passed", printed.partition("test: large samples")[2])
    assert passed
    assert int(passed[2]) > int(passed[1]) > 0


def test_a_stage_that_does_not_exist(tmp_path):
    status, printed = gpu_check("--results", tmp_path, GPU_CHECK="tset")
    assert status == 1
    assert (
        "GPU_CHECK: wanted some of build,variants,smoke,bench,tune,test,sanitize,sample, got tset"
        in printed
    )


# --- the rest of the logic, on steps that take a moment -------------------------------------------


def step(name, code, seconds=1, **options):
    return running.Step("stage", name, [sys.executable, "-c", code], seconds, **options)


@pytest.fixture
def log(tmp_path):
    with running.Log(tmp_path, "call") as log:
        yield log


def test_nothing_runs_without_what_is_needed(tmp_path, log):
    fails = step("fails", "print('no such thing'); raise SystemExit(3)", needed=True)
    skipped = step("skipped", "", skipped="not installed")
    outcomes = running.run_all([skipped, fails, step("next", "")], 60, log)
    assert [outcome.result for outcome in outcomes] == [
        "skipped (not installed)",
        "failed (status 3)",
        "not run (stage: fails failed (status 3))",
    ]
    assert [outcome.good for outcome in outcomes] == [True, False, False]
    assert outcomes[1].error == "no such thing"
    missing = running.Step("stage", "missing", [str(tmp_path / "missing")], 1)
    assert running.run_all([missing], 60, log)[0].result.startswith("failed (")


def test_a_step_that_outlasts_its_limit_takes_nothing_from_the_next(tmp_path, log):
    """What it printed until then is kept."""
    sleeps = step("sleeps", "import time; print('begun', flush=True); time.sleep(60)")
    first, second = running.run_all([sleeps, step("next", "", seconds=8)], 10, log)
    assert first.result == "timed out"
    assert first.limit == pytest.approx(2, abs=0.5)
    assert (second.result, second.limit > 4) == ("passed", True)
    assert "begun" in (tmp_path / "call.log").read_text()


def test_what_is_needed_may_take_the_time_of_what_would_not_run_without_it(log):
    slow = step("slow", "import time; time.sleep(1.5)", needed=True)
    first, second = running.run_all([slow, step("next", "", seconds=9)], 10, log)
    assert first.limit == pytest.approx(10, abs=0.5)
    assert (second.result, second.limit < 9) == ("passed", True)


@pytest.mark.parametrize(
    "lines, error",
    [
        (["ok", "E       assert 1 == 2", "FAILED test_x"], "E       assert 1 == 2"),
        (["a.cu(3): error: expected a ;", "2 errors"], "a.cu(3): error: expected a ;"),
        (["========= Invalid __global__ read", "x"], "========= Invalid __global__ read"),
        (["Traceback", "RuntimeError: CUDA error: x"], "RuntimeError: CUDA error: x"),
        (["one", "two"], "two"),
        ([], ""),
    ],
)
def test_the_first_line_that_says_what_went_wrong(lines, error):
    assert running.first_error(lines) == error


def test_a_long_summary_keeps_what_is_worst(tmp_path):
    (tmp_path / "device").mkdir()
    rows = [f"line {i}" + "." * (100 + i) for i in range(300)]
    (tmp_path / "device" / "ops.json").write_text(json.dumps({"summary": rows}))
    passed = running.Outcome(step("fine", ""), "passed")
    failed = running.Outcome(step("bad", ""), "failed (status 1)", error="why")
    text = running.summary("first", [passed, failed], tmp_path)
    assert text.count("\n") < 100
    assert 10_000 < len(text) < 11_200
    assert text.split("\n")[2] == "* **stage: bad failed (status 1)** why"
    assert "* line 0." in text
    assert "| stage | bad | 0 | 1 | failed (status 1) |" in text


def test_a_summary_names_what_failed(tmp_path, log):
    """Below its step, and not what another call has left."""
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "tune.json").write_text(json.dumps({"summary": ["of another call"]}))
    code = "print('Error: one'); print('FAILED a kind: 3 of 4'); print('1 of 4'); exit(1)"
    outcomes = running.run_all([step("fails", code)], 60, log)
    text = running.summary("first", outcomes, tmp_path, since=time.time() + 10)
    assert text.split("\n")[2:4] == [
        "* **stage: fails failed (status 1)** Error: one", "    * a kind: 3 of 4",
    ]  # fmt: skip
    assert "failed (status 1) | 1 of 4 |" in text
    assert "of another call" not in text


def test_a_step_without_the_seconds_that_it_needs_is_skipped(log):
    steps = [step("long", "", seconds=0, least=90), step("short", "")]
    first, second = running.run_all(steps, 60, log)
    assert (first.result, first.good) == ("skipped (59 s left)", True)
    assert second.result == "passed"
