"""python -m benchmarks.report: ratios, targets, and the files that it writes."""

import json
import os
import pathlib
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `pytest` alone, unlike `python -m pytest`, leaves it out

from benchmarks import plot, report, results, suite, targets  # noqa: E402

WORK = "op, variant, 2x3 float32 contiguous"
OTHER = "op, other, 2x3 float32 contiguous"


def row(group, implementation, seconds):
    info = {"op": "op", "variant": group.split(", ")[1], "shape": [2, 3], "dtype": "float32"}
    info |= {"layout": "contiguous", "baseline": "eager", "implementation": implementation}
    info |= {"gb_per_s": 1.5, "percent_of_copy": 80.0, "max_error": 1e-7}
    stats = {"min": seconds, "median": 2 * seconds}
    return {"group": group, "stats": stats, "extra_info": info}


@pytest.fixture
def run(tmp_path):
    """run({work: {implementation: seconds}}) writes a run's JSON; its path."""
    count = iter(range(9))

    def write(works, left_out=(), device="Some CPU"):
        rows = [row(work, *item) for work, times in works.items() for item in times.items()]
        path = tmp_path / f"run{next(count)}.json"
        machine = {"device": device, "torch": "2"}
        path.write_text(
            json.dumps({"machine_info": machine, "left_out": left_out, "benchmarks": rows})
        )
        return path

    return write


@pytest.fixture
def judged(tmp_path, capsys):
    """judged(run, target) -> (exit status, what was printed)"""

    def judge(path, **target):
        wanted = {"name": "a target", "works": [WORK], "over": "eager", **target}
        file = tmp_path / "targets.json"
        file.write_text(json.dumps({"targets": [wanted]}))
        status = report.main([str(path), "--out", str(tmp_path / "out"), "--fail-below", str(file)])
        return status, capsys.readouterr().out

    return judge


TIMES = {WORK: {"copy": 0.5, "eager": 6.0, "compiled": 3.0, "ours": 2.0, "ours, quick": 1.0}}


def test_ratios(run):
    group = results.load([run(TIMES)]).groups[WORK]
    assert group.ratio("eager") == 3
    assert group.ratio("eager", "compiled") == 2
    assert group.ratio("eager", by="median") == 3
    assert group.ratio("diffusers") is None


def test_of_several_runs_the_best_time_counts(run):
    paths = [run({WORK: {"eager": 8.0, "ours": 1.0}}), run({WORK: {"eager": 6.0, "ours": 2.0}})]
    assert results.load(paths).groups[WORK].ratio("eager") == 6


def test_runs_of_parts_are_a_whole_together(run):
    paths = [run(TIMES, left_out=["a", "b"]), run(TIMES, left_out=["c"])]
    assert results.load(paths[:1]).left_out == ["a", "b"]
    assert results.load(paths).left_out == []


def test_runs_on_two_devices_have_no_ratio(run):
    with pytest.raises(ValueError, match="wanted runs on one device"):
        results.load([run(TIMES, device="A"), run(TIMES, device="B")])


@pytest.mark.parametrize(
    "target, met",
    [
        ({"at_least": 3.0}, True),
        ({"at_least": 3.01}, False),
        ({"at_least": 6.0, "of": "ours*"}, True),
        ({"at_least": 1.5, "over": "compiled"}, True),
        ({"at_least": 1.51, "over": "compiled"}, False),
        ({"at_most": 4.0, "over": "copy"}, True),
        ({"at_most": 3.99, "over": "copy"}, False),
        ({"at_most": 2.0, "over": "copy", "of": "ours*"}, True),
    ],
    ids=str,
)
def test_a_target(run, judged, target, met):
    status, said = judged(run(TIMES), **target)
    assert status == int(not met)
    assert said.startswith("met" if met else "MISSED")


@pytest.mark.parametrize("target", [{"over": "diffusers"}, {"works": ["op, nowhere*"]}], ids=str)
def test_what_was_not_measured_is_missed_unless_the_run_was_partial(run, judged, target):
    status, said = judged(run(TIMES), at_least=1, **target)
    assert status == 1
    assert "MISSED" in said
    assert "not measured" in said
    status, said = judged(run(TIMES, left_out=["a row"]), at_least=1, **target)
    assert status == 0
    assert said.startswith("left out")


def test_a_partial_run_still_misses_what_it_measured(run, judged):
    assert judged(run(TIMES, left_out=["a row"]), at_least=99)[0] == 1


def test_every_work_of_a_pattern_counts(run, judged):
    path = run({**TIMES, OTHER: {"eager": 1.0, "ours": 1.0}})
    status, said = judged(path, works=["op, *"], at_least=2)
    assert status == 1
    assert "1 of 2 met, 1 missed" in said


@pytest.mark.parametrize("instructions", ["avx2", "avx512", "baseline", None])
def test_a_folder_of_targets_is_for_the_processor(run, instructions):
    found = results.load([run(TIMES)])
    found.machine["instructions"] = instructions
    folder = ROOT / "benchmarks" / "targets"
    if instructions in ("avx2", "avx512"):
        names = [file.name for file in targets.files_for(folder, found)]
        assert names == ["cpu.json", f"{instructions}.json"]
    else:
        with pytest.raises(ValueError, match=f"no targets for {instructions or 'this device'}"):
            targets.files_for(folder, found)
    assert targets.files_for(folder / "cpu.json", found) == [folder / "cpu.json"]


def test_the_report_says_which_targets_it_used(run, judged, tmp_path):
    _, said = judged(run(TIMES), at_least=1)
    assert said.splitlines()[-2].endswith("1 of 1 met, 0 missed, of targets.json")
    assert "## Targets of targets.json" in (tmp_path / "out" / "results.md").read_text()


def test_a_target_has_one_limit():
    with pytest.raises(ValueError, match="wanted one of at_least and at_most"):
        targets.Target("both", (WORK,), "eager", at_least=1, at_most=2)


def test_the_files(run, tmp_path):
    out = tmp_path / "out"
    path = run({**TIMES, OTHER: {"eager": 1.0, "ours": 4.0}})
    assert report.main([str(path), "--out", str(out)]) == 0
    assert (out / "plot.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in (out / "results.md").read_text().splitlines() if line[:1] == "|"]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1] == "variant, 2×3, float32, contiguous"
    assert cells[2:4] == ["6e+03", "2e+03"]
    assert cells[4:8] == ["2.00", "6.00", "3.00", "3.00"]  # compiled, quick, ours, by medians
    again = results.load([out / "results.json"])
    assert again.groups[WORK].ratio("eager") == 3
    assert again.machine["device"] == "Some CPU"


def test_the_plot_shows_every_bar_to_its_end(run):
    third = WORK.replace("op, variant", "group_norm_act, variant")
    works = {WORK: {"eager": 1.0, "ours": 1.0}, OTHER: {"eager": 40.0, "ours": 1.0}}
    figure = plot.figure_of(results.load([run({**works, third: {"eager": 1.0, "ours": 4.0}})]))
    ends = [
        (ax.get_xlim(), bar.get_x(), bar.get_x() + bar.get_width())
        for ax in figure.get_axes()
        for bar in ax.patches
    ]
    assert max(end for _, _, end in ends) == 40
    for (left, right), start, end in ends:
        assert left <= start
        assert end <= right


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "targets").iterdir()), ids=str)
def test_the_committed_targets_are_about_rows_of_the_suite(path):
    rows = {}
    for test in suite.TESTS:
        for work, name in suite.rows(test, quick=False):
            rows.setdefault(work.name, []).append(name)
    for target in targets.read(path):
        for pattern in target.works:
            found = [names for work, names in rows.items() if fnmatchcase(work, pattern)]
            assert found, pattern
            for names in found:
                assert target.over in names, (pattern, target.over)
                assert any(fnmatchcase(name, target.of) for name in names), (pattern, target.of)


def test_from_a_quick_run_to_a_report(tmp_path):
    path, out = tmp_path / "run.json", tmp_path / "out"

    def done(*command):
        knobs = {"DIFFUSION_EXT_BENCH_QUICK": "1", "DIFFUSION_EXT_BENCH_DEVICE": "cpu"}
        # pytest-benchmark would take the run for a worker of pytest-xdist, and measure nothing.
        ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
        environment = {**ours, **knobs}
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run([sys.executable, "-m", *map(str, command)], **options)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    suite_run = ["pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-m", "not compiles"]
    suite_run += ["-k", "test_perturb and not bfloat16 and not float16"]
    suite_run += ["--benchmark-max-time=0.01"]
    done(*suite_run, f"--benchmark-json={path}")
    data = json.loads(path.read_text())
    assert data["left_out"]
    assert data["machine_info"]["device"]
    assert len(data["benchmarks"]) == 12  # noise given, noise made
    for benchmark in data["benchmarks"]:
        assert benchmark["stats"]["rounds"] >= 2
        assert benchmark["extra_info"]["percent_of_copy"] > 0
        assert benchmark["extra_info"]["gb_per_s"] > 0
    assert "NOW" in done(*suite_run, f"--benchmark-compare={path}")
    assert "Partial" not in done("benchmarks.report", path, "--out", out)
    assert "**Partial**" in (out / "results.md").read_text()
