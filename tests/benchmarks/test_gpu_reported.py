"""How gpu_check.py runs pytest: faults of the GPU cost a worker, and no failure is lost."""

import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("xdist")
pytest.importorskip("pytest_timeout")

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = """
import os, time
import pytest, torch

def faulty():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")

@pytest.mark.parametrize("n", range(3))
def test_is_wrong(n):
    assert n == 9, "no such number"

def test_faults(monkeypatch):
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, faulty
    faulty()

def test_crashes():
    os._exit(7)

def test_hangs():
    time.sleep(600)

@pytest.mark.parametrize("n", range(20))
def test_is_right(n):
    time.sleep({seconds})
"""


def run(folder, *options, seconds=0, **environment):
    (folder / "test_some.py").write_text(TESTS.replace("{seconds}", str(seconds)))
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider"]
    command += ["-p", "faults", "-p", "benchmarks.gpu.reported", "-c", os.devnull, "--rootdir"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "ops")))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [*command, str(folder), *options, "test_some.py"], cwd=folder, text=True,
        env={**clean, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_what_ends_a_worker_is_named_and_the_rest_runs(tmp_path):
    options = ("-n", "2", "--timeout", "3", "--timeout-method", "thread")
    status, printed = run(tmp_path, *options)
    assert status == 1
    assert "6 failed, 20 passed" in printed
    for name in ("faults", "crashes", "hangs"):
        assert re.search(
            rf"^FAILED test_some.py::test_{name}: 1 cases: worker .* crashed", printed, re.M
        )
    assert "test_some.py::test_faults: the GPU had a fault: CUDA error: an illegal" in printed
    assert re.search(r"^FAILED .*is_wrong: 3 cases: AssertionError: no such number", printed, re.M)
    assert printed.index("test_is_wrong[0] (call): Assertion") < printed.index("FAILED ")


def test_without_workers_a_fault_ends_the_run(tmp_path):
    status, printed = run(tmp_path, "-p", "no:xdist")
    assert status == 1
    assert "Exit: test_some.py::test_faults: the GPU had a fault: CUDA error" in printed
    assert "FAILED test_some.py::test_is_wrong: 3 cases" in printed


def test_the_run_ends_before_its_time_does(tmp_path):
    options = ("-n", "1", "-k", "right")
    _, printed = run(tmp_path, *options, seconds=1, GPU_CHECK_END=str(time.monotonic() + 18))
    assert "FAILED out of time" in printed
    passed = int(re.search(r"(\d+) passed", printed)[1])
    assert 0 < passed < 20
