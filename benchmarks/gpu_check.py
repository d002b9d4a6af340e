"""Proves, tunes and measures the CUDA side on the GPU at hand, in two calls: `make gpu-check`.

    CALL=first    at most 300 s: build, variants, smoke, bench, tune
    CALL=second   at most 270 s: build, test, sanitize, sample, bench

    build     both libraries, compiled for this GPU into build/gpu_check
    variants  libraries of the kernels with other constants, for tune
    smoke     every op beside the float64 reference, and beside what the CPU makes of it
    bench     ops.json, ops.md; first: in bfloat16; second: everything
    tune      times the variants; tune.json, tune.md: which constants of csrc/cuda/tuning.h win,
              and that file as this GPU would have it
    test      tests/ops on CUDA tensors; CUDA graphs and the engine "graph"
    sanitize  compute-sanitizer's tools over a small call of every op
    sample    sampling.json, sampling.md: ContextUnet's whole runs; networks.json, networks.md:
              a UNet and a decoder of Stable Diffusion's shape, eager, fused, compiled

GPU_CHECK=build,bench chooses stages; without build, the others use the last one. A stage that fails
or outlasts its limit does not stop the next ones, but the exit status says so. Within a stage an
item that crashes, hangs or breaks the CUDA context costs itself alone (benchmarks/gpu/items.py).
Results are written as they come, to RESULTS/<device>, with all that was printed (<call>.log) and a
summary, worst first (<call>.md). Needs torch >= 2.10, nvcc, pytest, ninja, pybind11 and setuptools
beside the package's own dependencies; pytest-xdist and pytest-timeout help; no network: what
.wheels has (make gpu-wheels) is installed for these runs alone. `--stand-in` runs every stage in
small on the stand-in for a GPU (tests/stand_in, make emulated), to test this script.

The seconds of CALLS are estimates for 16 cores and an H200: no GPU has run this yet.

    build     A file of kernels takes nvcc 6 to 11 s for one architecture (measured on two shared
              cores), and all sixteen compile beside each other; then the CPU's library.
              The second call compiles only what a new header changes, where it finds the first's.
    variants  Some 760 s of one core, by the same measurement: 50 s on sixteen.
    smoke     Two imports of torch, 4 s each; 513 checks take 7 s on a CPU.
    bench     82 rows (164 in the second call) of three calls, each timed 7 times 4 ms with and
              without a graph: 30 s (60 s); then a compiled baseline every 2 to 5 s.
    tune      640 timings of 7 times 4 ms and a check: 45 s; and the small works of 29 variants.
    test      1,700 tests of some 20 ms in four processes, and twice the start of these.
    sanitize  A tool slows an import of torch a few times and a launch 10 to 100 times, says its
              documentation: 15 s to start, then some 5 calls a second, of 360.
    sample    9 ways to run three networks at 3 s, 40 runs at 0.5 s; a decoder compiles in 20 s, a
              UNet in 60 s.

When they do not hold, this is lost first: in bench, then in sample, the compiled baselines; in
bench the rows without a target; in sanitize synccheck and initcheck, then the calls that repeat a
kernel in another dtype or layout; in tune the elementwise ops at the size of latents.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import shutil
import sys
import time
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this file is a script

from benchmarks.gpu.running import Log, Step, run_all, sanitizer, summary  # noqa: E402

RESULTS, OPS = ROOT / "benchmarks" / "results", ROOT / "tests" / "ops"
WHEELS, STAND_IN_FOLDER = ROOT / ".wheels", ROOT / "tests" / "stand_in" / "site"
EMULATED = ROOT / "build" / "emulated" / "python" / "diffusion_ext" / "_cuda.so"

# Stage -> its seconds, perhaps others for each call. A call's own are as many: what a stage leaves
# goes to the next that needs it, and bench and tune, which fill any time, come late.
CALLS = {
    "first": {"build": 60, "variants": 75, "smoke": 25, "bench": 60, "tune": 80},
    "second": {"build": 60, "test": 75, "sanitize": 50, "sample": 50, "bench": 35},
}
SECONDS = {"first": 300, "second": 270}
STAGES = tuple(dict.fromkeys(stage for stages in CALLS.values() for stage in stages))
# Of the seconds of the stage sanitize; in this order.
TOOLS = {"memcheck": 0.6, "racecheck": 0.4, "initcheck": 0, "synccheck": 0}
TOOL_LEAST = 35  # seconds in which a tool can start torch and watch anything
WORKERS, MOST_RESTARTS, TEST_SECONDS = 4, 30, 40  # of pytest

LOADED = """
import pathlib, sys, torch, diffusion_ext as dx
from diffusion_ext.ops.backend import missing
library = sys.argv[1]
print(dx.info())
assert pathlib.Path(dx.__file__).is_relative_to(library), f"another build: {dx.__file__}"
assert "cuda" not in missing, missing["cuda"]
print("device:", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
"""


@dataclass(frozen=True)
class Plan:
    """A call on a GPU, or on the stand-in for one: what its stages' steps are made of."""

    call: str
    stand_in: bool
    results: pathlib.Path

    @property
    def folder(self) -> pathlib.Path:
        return ROOT / "build" / "gpu_check" / ("stand_in" if self.stand_in else "cuda")

    @property
    def library(self) -> pathlib.Path:
        return self.folder / "lib"

    def using(self) -> dict[str, str]:
        """The environment of what uses the build. PYTHONPATH comes before any installed package,
        but after the working folder, where there is one: python -c and -m have to run in lib."""
        paths = [self.library, OPS, ROOT, self.folder / "wheels", os.environ.get("PYTHONPATH", "")]
        knobs = {}
        if self.stand_in:
            paths.insert(0, STAND_IN_FOLDER)
            knobs["GPU_CHECK_STAND_IN"] = "1"
        return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)), **knobs}

    def module(self, stage: str, name: str, seconds: float, *arguments: object) -> Step:
        """A step that runs python -m NAME on the build."""
        command = [sys.executable, "-m", name, *arguments]
        return Step(stage, name.rpartition(".")[2], command, seconds, self.using(), self.library)

    def build(self, seconds: float) -> list[Step]:
        """Ninja compiles again only what changed; lib is made anew, lest it keep old modules."""
        command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", self.folder]
        command += ["build", "--build-lib", self.library]
        if not self.stand_in:  # which takes the objects of the tree's own build
            command += ["--build-temp", self.folder / "temp"]
        knobs = {"DIFFUSION_EXT_NATIVE": "1", "DIFFUSION_EXT_CUDA": "0" if self.stand_in else "1"}
        loaded = [sys.executable, "-c", LOADED, self.library]
        steps = [
            Step("build", "compile", command, seconds - 20, knobs, needed=True),
            Step("build", "load", loaded, 10, self.using(), self.library, needed=True),
        ]
        if self.stand_in:
            copy = ["cp", EMULATED, self.library / "diffusion_ext"]
            steps.insert(1, Step("build", "emulated kernels", copy, 1, needed=True))
        if wheels := sorted(WHEELS.glob("*.whl")):
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
            into = ["--no-compile", "--upgrade", "--target", self.folder / "wheels"]
            steps.insert(0, Step("build", "wheels", [*pip, *into, *wheels], 10))
        return steps

    def variants(self, seconds: float) -> list[Step]:
        return [self.module("variants", "benchmarks.gpu.variants", seconds)]

    def smoke(self, seconds: float) -> list[Step]:
        return [self.module("smoke", "benchmarks.gpu.smoke", seconds)]

    def bench(self, seconds: float) -> list[Step]:
        only = ["--dtype", "bfloat16"] if self.call == "first" else []
        return [self._measured("bench", "benchmarks.gpu.bench", seconds, *only)]

    def tune(self, seconds: float) -> list[Step]:
        return [self._measured("tune", "benchmarks.gpu.tune", seconds)]

    def sample(self, seconds: float) -> list[Step]:
        runs = self._measured("sample", "benchmarks.gpu.sampling", 0.5 * seconds)
        return [self._measured("sample", "benchmarks.gpu.diffusion_models", 0.5 * seconds), runs]

    def _measured(self, stage: str, name: str, seconds: float, *more: object) -> Step:
        return self.module(stage, name, seconds, "--results", self.results, *more)

    def test(self, seconds: float) -> list[Step]:
        """In WORKERS processes where pytest-xdist is installed: one that hangs in a test for
        TEST_SECONDS, crashes, or has a dead CUDA context (tests/ops/faults.py) is replaced.
        A warning is no error here: another torch may have others."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rN", "-W", "default"]
        command += ["--durations=5", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.reported"]
        command += ["-m", "not compiles"]  # which would leave little time for the rest
        workers = importlib.util.find_spec("xdist") is not None
        if workers:  # not --dist loadgroup, whose xdist fails as two workers are replaced at once
            command += ["--dist", "load", "--max-worker-restart", MOST_RESTARTS]
        if importlib.util.find_spec("pytest_timeout"):  # a thread ends the process: only a worker's
            method = "thread" if workers else "signal"
            command += ["--timeout", TEST_SECONDS, "--timeout-method", method]
        threads = {"OMP_NUM_THREADS": "1"} if workers else {}
        environment = {"DIFFUSION_EXT_TEST_BACKENDS": "cuda", **threads, **self.using()}
        return [
            Step("test", name, [*command, *files, *(["-n", number] if workers else [])],
                 share * seconds, environment, self.library)
            for name, (files, number, share) in self.tests().items()
        ]  # fmt: skip

    def tests(self) -> dict[str, tuple[list, int, float]]:
        """Step -> (what pytest is given, worker processes, its share of the stage's seconds)."""
        large, rooms = OPS / "test_large.py", sorted(ROOT.glob("tests/*/test_*_cuda.py"))
        ops = [OPS, f"--ignore={large}"]
        if self.stand_in:  # a few of them: `make gpu-tests` runs them all
            ops, rooms = [OPS / "test_backends.py"], [*rooms, "-k", "stream or cannot"]
        return {
            "tests/ops": (ops, WORKERS, 0.4),
            "large samples": ([large], 1, 0.3),  # memory has room for one at a time
            "other rooms": (rooms, WORKERS, 0.3),
        }

    def sanitize(self, seconds: float) -> list[Step]:
        """Each tensor an allocation of its own, so that one byte too far is seen. The first tools
        share what is planned; the others have what is left of the call."""
        alone = self.module("sanitize", "benchmarks.gpu.sanitized", seconds)
        alone.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        tool, _ = sanitizer()
        why = "" if tool else "compute-sanitizer is not installed"
        return [
            dataclasses.replace(alone, name=name, command=[*alone.command, "--tool", name],
                                seconds=share * seconds, skipped=why, least=TOOL_LEAST)
            for name, share in TOOLS.items()
        ]  # fmt: skip

    def steps(self, stages: list[str]) -> list[Step]:
        limits = CALLS[self.call]
        return [s for stage in stages for s in getattr(self, stage)(limits[stage])]


def chosen_stages(call: str) -> list[str]:
    names = [name for name in os.environ.get("GPU_CHECK", "").split(",") if name]
    if unknown := set(names) - set(STAGES):
        sys.exit(f"GPU_CHECK: wanted some of {','.join(STAGES)}, got {','.join(sorted(unknown))}")
    return [stage for stage in CALLS[call] if stage in names or not names]


def run_call(plan: Plan, seconds: float) -> bool:
    """Whether all stages of a call were good."""
    stages = chosen_stages(plan.call)
    if "build" in stages:
        shutil.rmtree(plan.library, ignore_errors=True)
        plan.library.mkdir(parents=True)
    elif stages and not (plan.library / "diffusion_ext").is_dir():
        sys.exit("nothing is built: the stage build comes first")
    start = time.time()
    with Log(plan.results, plan.call) as log:
        outcomes = run_all(plan.steps(stages), seconds, log)
    text = summary(plan.call, outcomes, plan.results, start)
    (plan.results / f"{plan.call}.md").write_text(text, encoding="utf-8")
    print(f"\n{text}", flush=True)
    return all(outcome.good for outcome in outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stand-in", action="store_true", help="in small, without a GPU")
    parser.add_argument("--call", choices=tuple(CALLS), help="default: one after the other")
    parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results")
    parser.add_argument("--seconds", type=float, help="of a call")
    arguments = parser.parse_args()
    if arguments.stand_in:
        os.environ["PATH"] = f"{STAND_IN_FOLDER / 'bin'}{os.pathsep}{os.environ['PATH']}"
    results = ROOT / "build" / "gpu_check" / "results" if arguments.stand_in else RESULTS
    results = (arguments.results or results).resolve()
    results.mkdir(parents=True, exist_ok=True)
    good = [
        run_call(Plan(call, arguments.stand_in, results), arguments.seconds or SECONDS[call])
        for call in ([arguments.call] if arguments.call else CALLS)
    ]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
