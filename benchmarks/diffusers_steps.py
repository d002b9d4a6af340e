"""diffusers' schedulers and ours of the same names, side by side: a step, the host's time with it.

    python -m benchmarks.diffusers_steps [NAME ...]

Microseconds a step on one thread, the least of several turns of three runs of diffusers' scheduler
and of ours, as a Markdown table. What a generator's noise costs is torch's on both sides: it is
measured in the same turns and taken off both. "counter": all of diffusers' step, its noise too,
beside ours with noise made in the kernel. "first": the first run of ours on a new scheduler, whose
steps are traced.
"""

from __future__ import annotations

import inspect
import sys
import time
import warnings

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusion_ext.integrations import diffusers as ours

from .device import cpu_name

SHAPES = [(1, 4, 64, 64), (2, 16, 128, 128)]
STEPS, TURNS, RUNS, SECONDS = 20, 15, 3, 10.0


def run(scheduler, x, m, generator) -> float:
    """Microseconds a step, over a run of the scheduler."""
    scheduler.set_timesteps(STEPS)
    options = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    if hasattr(scheduler, "scale_model_input"):  # some ask for it before a step
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    start = time.perf_counter()
    for t in scheduler.timesteps:
        scheduler.step(m, t, x, **options)
    return (time.perf_counter() - start) / len(scheduler.timesteps) * 1e6


def draw(x, generator) -> float:
    start = time.perf_counter()
    for _ in range(STEPS):
        randn_tensor(x.shape, generator=generator, dtype=x.dtype)
    return (time.perf_counter() - start) / STEPS * 1e6


def draws(scheduler, x, m) -> float:
    """How many times a step draws from its generator."""
    scheduler.set_timesteps(STEPS)
    generator, count = torch.Generator(), 0
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return 0.0
    for t in scheduler.timesteps:
        before = generator.get_state()
        scheduler.step(m, t, x, generator=generator)
        count += not torch.equal(before, generator.get_state())
    return count / len(scheduler.timesteps)


def side_by_side(name: str, shape) -> list[float]:
    """(diffusers', ours, ours of counters, the drawing, ours for the first time)"""
    x, m, generator = torch.randn(shape), torch.randn(shape), torch.Generator()
    theirs, new = getattr(diffusers, name)(), getattr(ours, name)()
    counter = type(new)(noise="counter") if "counter" in type(new).noises else new
    if hasattr(counter, "set_seeds") and counter is not new:
        counter.set_seeds(7)
    first = run(new, x, m, generator)
    share, best = draws(theirs, x, m), [float("inf")] * 4
    end = time.perf_counter() + SECONDS
    for _ in range(TURNS):
        if time.perf_counter() > end:  # Brownian motion takes long
            break
        for i, scheduler in enumerate((theirs, new, counter)):
            runs = [run(scheduler, x, m, generator) for _ in range(RUNS)]  # the first is cold
            best[i] = min(best[i], *runs)
        best[3] = min(best[3], draw(x, generator) * share)
    return [*best, first]


def columns(name: str, shape) -> list[str]:
    theirs, new, counter, drawing, first = side_by_side(name, shape)
    apart = theirs - drawing, new - drawing
    cells = [f"{apart[0]:.0f} / {apart[1]:.1f} ({apart[0] / apart[1]:.1f}x)"]
    whole = f"{theirs:.0f} / {counter:.1f} ({theirs / counter:.1f}x)"
    return [*cells, whole if drawing else "", f"{first:.0f}"]


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)  # as pipelines do
    print(f"{cpu_name()}, one thread, float32, us a step: diffusers / ours (times as fast)\n")
    heads = [h for s in SHAPES for h in ("x".join(map(str, s)), "counter", "first")]
    print("| | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    for name in names or ours.__all__:
        cells = [cell for shape in SHAPES for cell in columns(name, shape)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
