"""python busy_machine.py seconds: what a network's calls take in a quiet time, and beside two
processes that spin, as torch runs it and fused, in turns; as JSON."""

from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
import time

import torch
from torch import nn

import diffusion_ext as dx

CHANNELS, BLOCKS, THREADS = 64, 8, 2


def network() -> nn.Sequential:
    """The blocks of which diffusion models are made."""
    parts = [
        layer
        for _ in range(BLOCKS)
        for layer in (nn.GroupNorm(8, CHANNELS), nn.SiLU(), nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1))
    ]
    return nn.Sequential(*parts).eval().requires_grad_(False)


@contextlib.contextmanager
def spinning(count: int):
    """Beside so many processes that spin."""
    started = []
    try:
        for _ in range(count):
            started.append(subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]))
        time.sleep(0.2 * count)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def times_of(calls: dict, seconds: float) -> dict[str, list[float]]:
    """Of each, in turns of three calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            for _ in range(3):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return times


def main(seconds: float) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    model, x = network(), torch.randn(1, CHANNELS, 32, 32)
    fused = copy.deepcopy(model)
    dx.fuse(fused)
    fused.to(memory_format=torch.channels_last)
    images = x.contiguous(memory_format=torch.channels_last)
    results = []  # whoever computes them, they are the same
    calls = {"eager": lambda: model(x), "fused": lambda: results.append(fused(images))}
    for _ in range(3):
        for call in calls.values():
            call()
    found = {}
    for name, count in (("quiet", 0), ("busy", 2)):
        with spinning(count):
            found[name] = times_of(calls, seconds)
    found["same"] = all(torch.equal(result, results[0]) for result in results)
    print(json.dumps(found))


if __name__ == "__main__":
    main(float(sys.argv[1]))
