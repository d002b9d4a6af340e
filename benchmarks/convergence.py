"""How fast each sampler approaches the solution where it is known, as a plot.

    python -m benchmarks.convergence docs/images/convergence.png

For data that are one Gaussian of mean MU and deviation C the best x0 of y = x/signal at r =
sigma/signal is MU + C²/(C² + r²)·(y - MU), and the probability flow ODE keeps (y - MU)/√(C² + r²).
tests/samplers/test_convergence.py holds the samplers to the orders seen here.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import diffusion_ext as dx

MU, C = 0.3, 0.7
CALLS = (9, 17, 33, 65, 129, 257)
# r from 0.05 to 1e5, so that the first steps, of lower order, do not count: there is little yet.
RATIOS = np.geomspace(0.05, 1e5, 1000)
ALPHA_BAR = 1 / (1 + RATIOS**2)
SCHEDULE = dx.NoiseSchedule.from_betas(1 - ALPHA_BAR / np.append(1, ALPHA_BAR[:-1]))

# Label -> the sampler, its options, calls of a step, colour.
SAMPLERS = {
    "euler, ddim": (dx.euler, {}, 1, "black"),
    "heun": (dx.heun, {}, 2, "tab:gray"),
    "dpm2": (dx.dpm2, {}, 2, "tab:brown"),
    "dpmpp_2s_ancestral, eta 0": (dx.dpmpp_2s_ancestral, {"eta": 0.0}, 2, "tab:orange"),
    "ipndm, plms": (dx.ipndm, {}, 1, "tab:cyan"),
    "dpmpp_2m": (dx.dpmpp_2m, {}, 1, "tab:blue"),
    "dpmpp_2m, order 3": (dx.dpmpp_2m, {"order": 3}, 1, "navy"),
    "unipc": (dx.unipc, {}, 1, "tab:red"),
    "unipc, order 3": (dx.unipc, {"order": 3}, 1, "darkred"),
    "deis": (dx.deis, {}, 1, "tab:green"),
    "lms": (dx.lms, {}, 1, "tab:olive"),
    "sa_solver, tau 0": (dx.sa_solver, {"tau": 0.0}, 1, "tab:purple"),
}


def best_model(table: dx.StepTable, seen: dict | None = None):
    """A model(x, t, c) of the best x0 for a run of a table; seen[r] becomes the last x/signal."""
    signal, sigma = table.levels[:-1].T
    levels = dict(zip(table.times.tolist(), zip(signal, sigma, strict=True), strict=True))

    def model(x, t, c):
        signal, sigma = levels[t[0].item()]
        y, r = x / signal, sigma / signal
        if seen is not None:
            seen[r] = y
        return MU + C * C / (C * C + r * r) * (y - MU)

    return model


def error(make, options: dict, steps: int) -> float:
    """The largest of 1000 samples', at the last level above 0, over their deviation."""
    table = make(SCHEDULE, steps + 1, spacing="exponential", prediction="x0", **options)
    r, seen = table.levels[:-1, 1] / table.levels[:-1, 0], {}
    model = best_model(table, seen)
    dx.sample(model, (1, 1000), table, dtype=torch.float64, progress=False)
    solution = MU + (seen[r[0]] - MU) * math.hypot(C, r[-1]) / math.hypot(C, r[0])
    return (seen[r[-1]] - solution).abs().max().item() / C


def figure_of(errors: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    ax = figure.subplots()
    for name, values in errors.items():
        ax.plot(CALLS, values, color=SAMPLERS[name][-1], marker="o", markersize=3, label=name)
    for order in (1, 2, 3, 4):
        line = [0.3 * (CALLS[-1] / calls) ** order / 2 ** (5 * order) for calls in CALLS]
        ax.plot(CALLS[2:], line[2:], ":", color="lightgray", zorder=0)
        ax.annotate(f"order {order}", (CALLS[-1], line[-1]), fontsize=8, color="gray")
    ax.set(xscale="log", yscale="log", xlabel="model calls", ylabel="largest error, in deviations")
    ax.set_xticks(CALLS, map(str, CALLS))
    ax.minorticks_off()
    ax.set_ylim(1e-7, 3)
    figure.legend(fontsize=8, loc="outside right center")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    picture = parser.parse_args().picture
    errors = {
        name: [error(make, options, (calls - 1) // of_step) for calls in CALLS]
        for name, (make, options, of_step, _) in SAMPLERS.items()
    }
    for name, values in errors.items():
        print(f"{name:26} " + " ".join(f"{value:.1e}" for value in values))
    figure_of(errors).savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
