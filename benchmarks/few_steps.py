"""How few steps each sampler needs: the share of generated digits that a classifier recognises.

    diffusion-ext demo && python benchmarks/few_steps.py runs/demo

A Markdown table. The classifier has seen real digits only (diffusion_ext/recognition.py).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import diffusion_ext as dx
from diffusion_ext.recognition import recognise_digits
from diffusion_ext.training import CHECKPOINT_NAME, load_checkpoint

STEPS = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a demo's checkpoint")
    parser.add_argument("--per-class", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.folder / CHECKPOINT_NAME)
    model = checkpoint.build_model().to(memory_format=torch.channels_last)
    labels = torch.arange(10).repeat_interleave(options.per_class)

    def recognised(table) -> float:
        shape = (len(labels), model.in_channels, model.height, model.height)
        result = dx.sample(model, shape, table, labels, options.guidance, seeds=0)
        return recognise_digits(result.images, labels).generated

    print("| sampler | " + " | ".join(map(str, STEPS)) + " |")
    print("|---" * (len(STEPS) + 1) + "|")
    for name, make in tables(checkpoint.schedule).items():
        shares = [f"{100 * recognised(make(steps)):.0f}" for steps in STEPS]
        print(f"| {name} | " + " | ".join(shares) + " |", flush=True)


if __name__ == "__main__":
    main()
