"""How good each sampler's images are for the model calls that it takes, and a plot of it.

    RECIPE="--n-feat 32 --prediction epsilon --schedule linear --timestep-sampling uniform"
    diffusion-ext train --out runs/digits --epochs 60 --batch-size 64 $RECIPE
    python -m benchmarks.emoji build/emoji.npy
    diffusion-ext train --data build/emoji.npy --out runs/emoji --epochs 100 $RECIPE
    python -m benchmarks.sampler_quality docs/images/sampler_quality.png \\
        "digits, 8x8" runs/digits digits "emoji, 16x16" runs/emoji build/emoji.npy

A number is the Frechet distance (Dowson & Landau 1982) of the samples from the real images, as
Gaussians of their first principal components. Prints a Markdown table for each model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from tqdm import tqdm

import diffusion_ext as dx
from diffusion_ext.training import CHECKPOINT_NAME, load_checkpoint, load_data

CALLS = (5, 7, 9, 13, 19, 29, 49)  # odd: of n steps with two calls each the last has one
COMPONENTS = 64
# Colours by family; a dashed line adds noise.
SAMPLERS = {
    "ddim": ("black", "-"),
    "heun": ("tab:gray", "-"),
    "dpm2": ("tab:brown", "-"),
    "dpmpp_2m": ("tab:blue", "-"),
    "unipc": ("tab:red", "-"),
    "deis": ("tab:green", "-"),
    "lms": ("tab:olive", "-"),
    "ipndm": ("tab:cyan", "-"),
    "plms": ("tab:pink", "-"),
    "euler_ancestral": ("black", "--"),
    "dpm2_ancestral": ("tab:brown", "--"),
    "dpmpp_2s_ancestral": ("tab:orange", "--"),
    "dpmpp_sde": ("tab:purple", "--"),
    "dpmpp_2m_sde": ("tab:blue", "--"),
    "dpmpp_3m_sde": ("tab:cyan", "--"),
    "sa_solver": ("tab:green", "--"),
}
TWO_CALLS = ("heun", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")


def table_of(name: str, schedule, calls: int) -> dx.StepTable:
    """A table of so many calls on Karras et al.'s grid, x0 clipped to the images' range."""
    steps = (calls + 1) // 2 if name in TWO_CALLS else calls - (name == "plms")
    table = getattr(dx, name)(schedule, steps, spacing="karras", clip=1.0)
    assert len(table) == calls
    return table


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); a, b [n, d] of covariances A, B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def curves(folder: Path, data: str, count: int) -> dict[str, list[float]]:
    """Sampler -> the distance for each of CALLS."""
    checkpoint = load_checkpoint(folder / CHECKPOINT_NAME)
    model = dx.optimize_for_sampling(checkpoint.build_model(), memory_format=torch.channels_last)
    real = load_data(data).images.flatten(1).numpy()
    mean = real.mean(0)
    _, _, components = np.linalg.svd(real - mean, full_matrices=False)
    components = components[:COMPONENTS].T
    shape = (count, model.in_channels, model.height, model.height)
    labels = torch.arange(count) % 10 if data == "digits" else None

    def distance(table) -> float:
        images = dx.sample(model, shape, table, labels, progress=False).images.clamp(-1, 1)
        drawn = images.flatten(1).numpy()
        return frechet_distance((drawn - mean) @ components, (real - mean) @ components)

    return {
        name: [distance(table_of(name, checkpoint.schedule, calls)) for calls in CALLS]
        for name in tqdm(SAMPLERS, desc=str(folder))
    }


def figure_of(models: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(6.5 * len(models), 5), layout="constrained")
    for ax, (title, lines) in zip(
        figure.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True
    ):
        for name, values in lines.items():
            colour, style = SAMPLERS[name]
            ax.plot(CALLS, values, style, color=colour, marker="o", markersize=3, label=name)
        ax.set(xscale="log", yscale="log", title=title, xlabel="model calls")
        ax.set_ylabel("Frechet distance from the real images")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xticks(CALLS, map(str, CALLS))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    ax.legend(fontsize=8, ncols=2)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("models", nargs="+", help="a title, a checkpoint's folder, its data, ...")
    parser.add_argument("--count", type=int, default=500, help="samples")
    options = parser.parse_args()
    triples = zip(*[iter(options.models)] * 3, strict=True)
    models = {t: curves(Path(folder), data, options.count) for t, folder, data in triples}
    for title, lines in models.items():
        print(f"\n| {title} | " + " | ".join(map(str, CALLS)) + " |")
        print("|---" * (len(CALLS) + 1) + "|")
        for name, row in lines.items():
            print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    figure_of(models).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
