"""One point of scaling.py in a process of its own: what a run costs in time and memory.

    python -m benchmarks.scaling_point '{"task": "sampling", "who": "ours", "batch": 32, ...}'

prints {"seconds": of the best run, "peak_bytes": above what the process had before the first one}.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import pathlib
import re
import sys
from functools import partial

import torch

import diffusion_ext as dx

from .device import clock, facts
from .eager import SCHEDULE
from .networks import (
    Networks,
    by_source_ddim,
    our_training,
    sampler,
    source_training,
    training_inputs,
)

SECONDS, LEAST, MOST = 1.5, 3, 50  # of one point; runs


def make_run(task: str, who: str, networks: Networks):
    """run() samples a batch, or takes a training step."""
    if task == "training":
        step = (our_training if who == "ours" else source_training)(networks)
        return partial(step, *training_inputs(networks))
    inputs = networks.case.draw(), networks.context(), networks.case.seeds()
    if who == "source":
        return partial(by_source_ddim(networks), *inputs)
    return partial(sampler(networks.for_sampling, dx.ddim(SCHEDULE, networks.steps)), *inputs)


def peak_bytes(device: str) -> int:
    """The most since `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)[1])


def forget_peak(device: str) -> None:
    """What building the networks has left behind is no part of a run."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    # Resets VmHWM, unlike getrusage's peak.
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    point = json.loads(sys.argv[1])
    device = point["device"]
    if device == "cpu":
        torch.set_num_threads(point["threads"])
    sizes = {name: point[name] for name in ("n_feat", "height", "batch", "steps")}
    # The code that is loaded by the first call belongs to the process, not to the run.
    make_run(point["task"], point["who"], Networks(device, 8, 8, 1, 2))()
    run = make_run(point["task"], point["who"], Networks(device, **sizes))
    forget_peak(device)
    before = peak_bytes(device)
    run()
    seconds = []
    while len(seconds) < LEAST or (sum(seconds) < SECONDS and len(seconds) < MOST):
        start = clock()
        run()
        seconds.append(clock() - start)
    peak = peak_bytes(device) - before
    print(json.dumps({"seconds": min(seconds), "peak_bytes": peak, "facts": facts(device)}))


if __name__ == "__main__":
    main()
