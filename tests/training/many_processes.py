"""Runs of the command line in processes of their own, for tests that stop or kill them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffusion_ext.training import load_checkpoint, read_log

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 33 images in batches of 8: the last batch has an image for the last process alone. Two batches to
# a step. Adam would blow the rounding of gradients near 0 up to whole steps.
TINY = [
    "--n-feat", "8", "--timesteps", "20", "--schedule", "cosine", "--prediction", "v", "--flip",
    "--optimizer", "SGD", "--learning-rate", "0.02", "--lr-schedule", "constant",
    "--clip-gradient", "1", "--batch-size", "8", "--accumulate", "2", "--validation", "0.1",
    "--log-every", "1", "--checkpoint-every", "1",
]  # fmt: skip
EPOCHS = ("--epochs", "4", "--samples-every", "2")


def write_images(path: Path, count: int = 37) -> Path:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 8, 8, 3), np.uint8)
    np.savez(path, images=images, labels=random.integers(0, 3, count))
    return path


def command(processes: int | None, *arguments, options: tuple = ()) -> list[str]:
    """A command of diffusion_ext's; None: without torchrun."""
    start = [sys.executable, "-m"]
    if processes is not None:
        where = () if any("--nnodes" in option for option in options) else ("--standalone",)
        start += ["torch.distributed.run", *where, f"--nproc-per-node={processes}", *options, "-m"]
    return [*start, "diffusion_ext", *map(str, arguments)]


def run(processes: int | None, *arguments, options: tuple = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes, *arguments, options=options),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_script(processes: int, script: str, folder: Path) -> subprocess.CompletedProcess:
    """Python by torchrun, with {here!r}, where the tests' modules are, and {folder!r} filled in."""
    path = folder / "script.py"
    path.write_text(script.format(here=str(Path(__file__).parent), folder=str(folder / "run")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, f"--nproc-per-node={processes}", path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def begin(
    processes: int | None, *arguments, options: tuple = (), first: Callable | None = None
) -> subprocess.Popen:
    """Args: first: called in the new process before the command."""
    return subprocess.Popen(
        command(processes, *arguments, options=options),
        env=ENVIRONMENT,
        preexec_fn=first,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, seconds: float = 60) -> None:
    """Until a run's log has come so far."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        rows = read_log(folder / "log.csv")
        if rows and int(rows[-1]["step"]) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {folder}: {process.communicate(timeout=10)[0]}")


def workers_of(process: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's workers, by their rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = {}
    for pid in children.read_text(encoding="utf-8").split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found = [line for line in environment if line.startswith(b"RANK=")]
        ranks |= {int(line.removeprefix(b"RANK=")): int(pid) for line in found}
    return [ranks[rank] for rank in sorted(ranks)]


def assert_same_weights(first: Path, second: Path) -> None:
    """Two finished runs have them, bit for bit."""
    one, other = (load_checkpoint(f / "checkpoint.safetensors") for f in (first, second))
    assert one.steps == other.steps
    for part in ("model", "ema", "optimizer"):
        expected, found = getattr(one, part), getattr(other, part)
        assert expected.keys() == found.keys()
        assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-6)


def assert_close_weights(first: Path, second: Path) -> None:
    """Two finished runs have them, to the rounding of sums in another order."""
    one, other = (load_checkpoint(f / "checkpoint.safetensors") for f in (first, second))
    assert (one.steps, one.samples_seen) == (other.steps, other.samples_seen)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
    np.testing.assert_allclose(one.validation_losses, other.validation_losses, rtol=1e-5)
    for name, weights in one.model.items():
        torch.testing.assert_close(other.model[name], weights, rtol=1e-4, atol=1e-5)
