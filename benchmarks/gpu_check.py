"""Proves and measures the CUDA side on the GPU at hand: `make gpu-check`, in under nine minutes.

    build     both libraries, compiled for this GPU into build/gpu_check
    test      tests/ops on CUDA tensors, and the engine "graph"
    sanitize  compute-sanitizer's four tools over a small call of every op
    bench     benchmarks/results/<device>/ops.json and ops.md
    sample    benchmarks/results/<device>/sampling.json and sampling.md

GPU_CHECK=build,bench chooses stages; without build, the others use the last one. A stage that fails
or outlasts its limit does not stop the next ones, but the exit status says so. Needs torch >= 2.10,
nvcc, pytest, ninja, pybind11 and setuptools beside the package's own dependencies; no network.
`--device cpu` runs every stage in small on the CPU, to test this script.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS, OPS = ROOT / "benchmarks" / "results", ROOT / "tests" / "ops"
STAGES = ("build", "test", "sanitize", "bench", "sample")
SECONDS = 525  # of all stages together

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What is said of torch's own calls is not about us; a process that imports torch starts slowly.
SANITIZER_OPTIONS = {"--error-exitcode": "86", "--report-api-errors": "no", "--launch-timeout": "0"}

LOADED = """
import pathlib, sys, torch, diffusion_ext as dx
from diffusion_ext.ops.backend import missing
library, device = sys.argv[1:]
print(dx.info())
assert pathlib.Path(dx.__file__).is_relative_to(library), f"another build: {dx.__file__}"
assert device not in missing, missing[device]
if device == "cuda":
    print("device:", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
"""


@dataclass
class Step:
    """A subprocess of a stage. share: of the time, beside the other steps' shares."""

    stage: str
    name: str
    command: list
    share: float
    environment: dict[str, str] = field(default_factory=dict)
    folder: pathlib.Path = ROOT
    needed: bool = False  # without it none of the later ones can run
    skipped: str = ""  # why


@dataclass
class Outcome:
    step: Step
    result: str  # passed, failed (...), timed out, skipped (...)
    seconds: float = 0
    limit: float = 0

    @property
    def good(self) -> bool:
        return self.result.partition(" ")[0] in ("passed", "skipped")


# --- the stages -----------------------------------------------------------------------------------


def build_steps(device: str, folder: pathlib.Path) -> list[Step]:
    """Ninja compiles again only what changed; the folder is made anew, lest it keep old modules."""
    cuda = device == "cuda"
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder]
    command += ["build", "--build-lib", folder / "lib"]
    if cuda:  # the CPU library for itself takes the objects of the tree's own build
        command += ["--build-temp", folder / "temp"]
    knobs = {"DIFFUSION_EXT_NATIVE": "1", "DIFFUSION_EXT_CUDA": "1" if cuda else "0"}
    loaded = [sys.executable, "-c", LOADED, folder / "lib", device]
    return [
        Step("build", "compile", command, 10, knobs, needed=True),
        Step("build", "load", loaded, 0.5, using(folder), folder / "lib", needed=True),
    ]


def using(folder: pathlib.Path, *more: pathlib.Path) -> dict[str, str]:
    """The environment of what uses the build. PYTHONPATH comes before any installed package, but
    after the working folder, where there is one: python -c and -m have to run in lib."""
    paths = [*map(str, (folder / "lib", *more)), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_steps(device: str, folder: pathlib.Path) -> list[Step]:
    """A warning is no error here: another torch may have others."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default"]
    command += ["--durations=5", "-p", "no:cacheprovider"]
    command += ["--maxfail=25"]  # after one fault of a GPU every test fails
    environment = {"DIFFUSION_EXT_TEST_BACKENDS": device, **using(folder)}
    ops = [OPS] if device == "cuda" else [OPS / "test_backends.py", OPS / "test_large.py"]
    # A CPU skips them. What torch.compile takes would leave little for the rest.
    engines = [ROOT / "tests" / "test_engines_cuda.py", "-m", "not compiles"]
    return [
        Step("test", name, [*command, *files], share, environment, folder / "lib")
        for name, files, share in (("tests/ops", ops, 5), ("engines", engines, 2))
    ]


def sanitize_steps(device: str, folder: pathlib.Path) -> list[Step]:
    script = [sys.executable, "-m", "benchmarks.gpu.sanitized", "--device", device]
    # Each tensor an allocation of its own, so that one byte too far is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **using(folder, OPS, ROOT)}
    lib = folder / "lib"
    if device == "cpu":
        return [Step("sanitize", "without a tool", ["env", *script], 0.5, environment, lib)]
    tool, options = sanitizer()
    why = "" if tool else "compute-sanitizer is not installed"
    return [
        Step("sanitize", name, [tool, "--tool", name, *options, *script], 0.5, environment, lib,
             skipped=why)
        for name in TOOLS
    ]  # fmt: skip


def sanitizer() -> tuple[str | None, list[str]]:
    """compute-sanitizer, of PATH or of nvcc's toolkit, and the options that it knows."""
    sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
    from toolkit import Toolkit, ask

    found = shutil.which("compute-sanitizer")
    try:
        for folder in ("bin", "compute-sanitizer"):
            found = found or shutil.which("compute-sanitizer", path=Toolkit().home / folder)
        known = ask(found, "--help") if found else ""
    except (OSError, subprocess.CalledProcessError):
        return None, []
    options = [o for pair in SANITIZER_OPTIONS.items() if pair[0] in known for o in pair]
    return found, options


def bench_steps(device: str, folder: pathlib.Path, results: pathlib.Path) -> list[Step]:
    command = [sys.executable, "-m", "benchmarks.gpu.bench", "--device", device]
    command += ["--results", results]
    return [Step("bench", "ops", command, 5, using(folder, OPS, ROOT), folder / "lib")]


def sample_steps(device: str, folder: pathlib.Path, results: pathlib.Path) -> list[Step]:
    command = [sys.executable, "-m", "benchmarks.gpu.sampling", "--device", device]
    command += ["--results", results]
    return [Step("sample", "runs", command, 4, using(folder, OPS, ROOT), folder / "lib")]


# --- running them ---------------------------------------------------------------------------------


def run(step: Step, limit: float) -> Outcome:
    """Streams to our own output. The step and what it started end with its time."""
    said = {"PYTHONUNBUFFERED": "1", "GPU_CHECK_SECONDS": f"{limit:.0f}"}
    environment = {**os.environ, **said, **step.environment}
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in step.command],
        cwd=step.folder,
        env=environment,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group to end as a whole
    )
    try:
        status = process.wait(limit)
        result = "passed" if status == 0 else f"failed (status {status})"
    except subprocess.TimeoutExpired:
        result = "timed out"
    finally:
        end_group(process)
    return Outcome(step, result, time.monotonic() - start, limit)


def end_group(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def run_all(steps: list[Step], seconds: float) -> list[Outcome]:
    """Each has its share of the time that is left: what one saves is the next ones'."""
    end, outcomes, missing = time.monotonic() + seconds, [], ""
    for i, step in enumerate(steps):
        shares = sum(other.share for other in steps[i:] if not other.skipped)
        limit = max(end - time.monotonic(), 1) * step.share / (shares or 1)
        why = step.skipped
        if missing:
            outcome = Outcome(step, f"not run ({missing})")
        elif why:
            outcome = Outcome(step, f"skipped ({why})")
        else:
            print(f"\n=== {step.stage}: {step.name}, at most {limit:.0f} s", flush=True)
            try:
                outcome = run(step, limit)
            except OSError as error:
                outcome = Outcome(step, f"failed ({error})")
            if step.needed and not outcome.good:
                missing = f"{step.stage}: {step.name} {outcome.result}"
        print(f"=== {step.stage}: {step.name} {outcome.result}", flush=True)
        outcomes.append(outcome)
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{'stage':<10}{'step':<16}{'seconds':>8}{'limit':>7}  result"]
    for o in outcomes:
        times = f"{o.seconds:>8.0f}{o.limit:>7.0f}" if o.limit else " " * 15
        lines.append(f"{o.step.stage:<10}{o.step.name:<16}{times}  {o.result}")
    return "\n".join(lines)


def chosen_stages() -> list[str]:
    names = [name for name in os.environ.get("GPU_CHECK", "").split(",") if name]
    if unknown := set(names) - set(STAGES):
        sys.exit(f"GPU_CHECK: wanted some of {','.join(STAGES)}, got {','.join(sorted(unknown))}")
    return [stage for stage in STAGES if stage in names or not names]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = os.environ.get("GPU_CHECK_DEVICE", "cuda")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--results", type=pathlib.Path, help="default: benchmarks/results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all stages together")
    arguments = parser.parse_args()
    device, stages = arguments.device, chosen_stages()
    folder = ROOT / "build" / "gpu_check" / device
    results = RESULTS if device == "cuda" else folder / "results"
    results = (arguments.results or results).resolve()
    if "build" in stages:
        shutil.rmtree(folder / "lib", ignore_errors=True)
        (folder / "lib").mkdir(parents=True)
    elif not (folder / "lib" / "diffusion_ext").is_dir():
        sys.exit("nothing is built: the stage build comes first")
    makers = {"build": build_steps, "test": test_steps, "sanitize": sanitize_steps}
    steps = [step for stage in stages if stage in makers for step in makers[stage](device, folder)]
    timed = {"bench": bench_steps, "sample": sample_steps}
    steps += [
        step for stage in stages if stage in timed for step in timed[stage](device, folder, results)
    ]
    outcomes = run_all(steps, arguments.seconds)
    print(f"\n{summary(outcomes)}", flush=True)
    return int(not all(outcome.good for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
