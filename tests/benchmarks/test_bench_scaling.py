"""python -m benchmarks.scaling: a small point from end to end, and what counts as more memory."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks import scaling  # noqa: E402


def test_a_point(tmp_path):
    command = [sys.executable, "-m", "benchmarks.scaling", "--quick", "--threads", "1"]
    command += ["--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert "2 points" in done.stdout, done.stdout + done.stderr  # sampling and training
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["point"]["task"] for row in rows] == ["sampling", "training"]
    for row in rows:
        for who in ("source", "ours"):
            assert row["seconds"][who] > 0
            assert row["peak_bytes"][who] >= 0
    text = (tmp_path / "scaling.md").read_text()
    assert "python -m benchmarks.scaling" in text
    assert "2×3×8×8" in text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more, within", [(0, True), (scaling.SLACK, True), (50 << 20, False)])
def test_more_memory_than_the_source(more, within):
    point = scaling.Point("sampling", 4, 16, 1, "cpu")
    peaks = {"source": 100 << 20, "ours": (100 << 20) + more}
    cost = scaling.Cost(point, {"source": 2.0, "ours": 1.0}, peaks)
    assert cost.within_memory == within
    assert cost.milliseconds == {"source": 500.0, "ours": 250.0}


def test_threads_end_with_all_of_them():
    points = scaling.sweeps("cpu", 6, quick=False)["threads"]
    assert [p.threads for p in points if p.task == "training"] == [1, 2, 4, 6]
    assert "threads" not in scaling.sweeps("cuda", 6, quick=False)
