"""k-diffusion's samplers and ours of the same names, side by side, on a model that costs nothing.

    python -m benchmarks.k_diffusion_runs

Microseconds for a step, the least of several turns of one function and the other, as a Markdown
table. SDE samplers are given noise that is there already, so that the step alone is compared; "with
noise" has k-diffusion draw torch.randn_like and ours make it in the kernel.
"""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path

import torch

import diffusion_ext.integrations.k_diffusion as ours

from .device import cpu_name

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "samplers"))
from counterparts import k_diffusion

SHAPES = [(1, 4, 64, 64), (8, 4, 64, 64), (1, 3, 512, 512)]
STEPS, TURNS = 20, 7
NAMES = [name for name in ours.__all__ if name.startswith("sample_")]


def microseconds(function, x, sigmas, options) -> float:
    start = time.perf_counter()
    function(lambda x, sigma: x, x, sigmas, disable=True, **options)
    return (time.perf_counter() - start) / STEPS * 1e6


def side_by_side(name: str, shape, with_noise: bool) -> tuple[float, float]:
    """(k-diffusion's, ours)"""
    sigmas = torch.cat([torch.linspace(14.6, 0.03, STEPS), torch.zeros(1)])
    x, z = torch.randn(shape), torch.randn(shape)
    noisy = "noise_sampler" in inspect.signature(getattr(ours, name)).parameters
    drawn = {"noise_sampler": lambda *_: torch.randn_like(x)}
    given = {"noise_sampler": lambda *_: z}
    options = [given, given] if noisy else [{}, {}]
    if with_noise:
        options = [drawn, {"noise_sampler": "counter"}]
    functions = getattr(k_diffusion(), name), getattr(ours, name)
    best = [float("inf")] * 2
    for _ in range(TURNS):
        for i, function in enumerate(functions):
            best[i] = min(best[i], microseconds(function, x, sigmas, options[i]))
    return best[0], best[1]


def main() -> None:
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, float32, us a step: k-diffusion / ours (times as fast)\n")
    print("| | " + " | ".join("x".join(map(str, shape)) for shape in SHAPES) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for name in NAMES:
        noisy = "noise_sampler" in inspect.signature(getattr(ours, name)).parameters
        for with_noise in (False, True) if noisy else (False,):
            pairs = [side_by_side(name, shape, with_noise) for shape in SHAPES]
            cells = [f"{a:.0f} / {b:.0f} ({a / b:.1f}x)" for a, b in pairs]
            print(
                f"| {name}{', with noise' * with_noise} | " + " | ".join(cells) + " |", flush=True
            )


if __name__ == "__main__":
    main()
