"""How few steps each sampler needs, on the digits of the demo.

    diffusion-ext demo && python benchmarks/few_steps.py runs/demo

Two Markdown tables: the share of generated digits that a classifier of real ones recognises, and
the Frechet distance of their pixels from the real digits', as Gaussians (Dowson & Landau 1982). The
first alone would praise blurred averages, which every classifier recognises.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import diffusion_ext as dx
from diffusion_ext.app.recognition import recognise_digits
from diffusion_ext.training import CHECKPOINT_NAME, load_checkpoint

STEPS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 50)


def tables(schedule):
    """name -> a function from a number of steps to a table; x0 is clipped to the images' range."""
    clip = {"clip": 1.0}
    return {
        "ddim": lambda n: dx.ddim(schedule, n, **clip),
        "ddim, eta 1": lambda n: dx.ddim(schedule, n, eta=1.0, **clip),
        "euler, karras": lambda n: dx.euler(schedule, n, **clip),
        "euler_ancestral, karras": lambda n: dx.euler_ancestral(schedule, n, **clip),
        "dpmpp_2m": lambda n: dx.dpmpp_2m(schedule, n, **clip),
        "dpmpp_2m, karras": lambda n: dx.dpmpp_2m(schedule, n, "karras", **clip),
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2); a, b [n, d] of covariances A, B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    gap = a.mean(0) - b.mean(0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a demo's checkpoint")
    parser.add_argument("--per-class", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.folder / CHECKPOINT_NAME)
    model = checkpoint.build_model().to(memory_format=torch.channels_last)
    labels = torch.arange(10).repeat_interleave(options.per_class)
    real = load_digits(return_X_y=True)[0] / 8 - 1  # [1797, 64] in [-1, 1]

    def measured(table) -> tuple[float, float]:
        shape = (len(labels), model.in_channels, model.height, model.height)
        images = dx.sample(model, shape, table, labels, options.guidance).images.clamp(-1, 1)
        share = 100 * recognise_digits(images, labels).generated
        return share, frechet_distance(images.flatten(1).double().numpy(), real)

    rows = {
        name: [measured(make(steps)) for steps in STEPS]
        for name, make in tables(checkpoint.schedule).items()
    }
    for title, i, digits in (("recognised, %", 0, 0), ("Frechet distance", 1, 2)):
        print(f"\n| {title} | " + " | ".join(map(str, STEPS)) + " |")
        print("|---" * (len(STEPS) + 1) + "|")
        for name, row in rows.items():
            print(f"| {name} | " + " | ".join(f"{cell[i]:.{digits}f}" for cell in row) + " |")


if __name__ == "__main__":
    main()
