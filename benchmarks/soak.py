"""Does memory stay flat? 1,000 training steps, then 200 sampling runs, in one process.

    python -m benchmarks.soak [--steps 1000] [--runs 200] [--json FILE] [--plot FILE.png]

The resident memory is read after each step and each run, when malloc has handed back what nobody
holds, whose amount comes and goes by tens of MB. What it grows by after the first tenth, smoothed
over a twentieth, is to stay within 2 MB: caches may fill at first, and then nothing may pile up.
Training writes its log and a checkpoint every hundred steps; the sampling runs go round all
samplers, with guidance, frames and a mask. Exit status 1 where memory has grown.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import diffusion_ext as dx
from diffusion_ext.samplers import SAMPLERS
from diffusion_ext.training import ImageData, Trainer, TrainingConfig

from .device import cpu_name

LIMIT_MB = 2.0
IMAGES, BATCH, SIDE, CLASSES = 320, 32, 16, 5  # ten steps an epoch
SCHEDULE = dx.NoiseSchedule.cosine(200)


LIBC = ctypes.CDLL("libc.so.6")


def resident_mb() -> float:
    LIBC.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 1e6


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return dx.nn.ContextUnet(3, 32, CLASSES, SIDE, norm="group")


def training(steps: int) -> list[float]:
    """Resident memory after each step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator) * 2 - 1
    data = ImageData(images, torch.arange(IMAGES) % CLASSES)
    per_epoch = IMAGES // BATCH
    config = TrainingConfig(
        epochs=steps // per_epoch, batch_size=BATCH, prediction="v", log_every=10,
        checkpoint_every=10, samples_every=0, validation=0.0, min_snr=5.0,
    )  # fmt: skip
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        run = Trainer(network(), SCHEDULE, data, folder, config)
        update = run.learner.update

        def watched(*arguments):
            result = update(*arguments)
            measured.append(resident_mb())
            return result

        run.learner.update = watched
        run.fit()
    return measured


def sampling(runs: int) -> list[float]:
    """Resident memory after each run."""
    model, measured = network(), []
    makers = list(SAMPLERS.values())
    start = torch.zeros(8, 3, SIDE, SIDE)
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 1
    for i in tqdm(range(runs), "sampling runs", disable=None):
        dx.sample(
            model,
            (8, 3, SIDE, SIDE),
            makers[i % len(makers)](SCHEDULE, 10, clip=1.0),
            context=torch.arange(8) % CLASSES,
            guidance_scale=2.0,
            seeds=8 * i,
            save_rate=5,
            start=start if i % 3 == 0 else None,
            mask=mask if i % 3 == 0 else None,
            progress=False,
        )
        measured.append(resident_mb())
    return measured


def growth(measured: list[float]) -> float:
    """MB between the first tenth's end and the highest later point, smoothed."""
    width = max(len(measured) // 20, 1)
    smooth = np.convolve(measured, np.ones(width) / width, mode="valid")
    later = smooth[len(measured) // 10 :]
    return float(later.max() - later[0])


def plot(parts: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(parts), figsize=(10, 3.5), layout="constrained")
    for axis, (name, measured) in zip(axes, parts.items(), strict=True):
        axis.plot(measured, linewidth=1)
        axis.axvline(len(measured) / 10, color="0.6", linestyle=":")
        axis.set_title(f"{name}: {growth(measured):+.2f} MB after the first tenth")
        axis.set_ylabel("resident memory, MB")
        middle = measured[len(measured) // 10]
        axis.set_ylim(middle - 30, middle + 30)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    parts = {}
    for name, measure, count in (
        ("training steps", training, options.steps),
        ("sampling runs", sampling, options.runs),
    ):
        parts[name] = measure(count)
        gc.collect()
        found = parts[name]
        print(
            f"{count} {name}: {found[0]:.1f} MB at first, {found[len(found) // 10]:.1f} after a "
            f"tenth, {found[-1]:.1f} at the end: {growth(found):+.2f} MB",
            flush=True,
        )
    result = {
        name: {"mb": [round(mb, 1) for mb in found], "growth_mb": growth(found)}
        for name, found in parts.items()
    }
    if options.json:
        options.json.write_text(json.dumps({"processor": cpu_name(), **result}))
    if options.plot:
        plot(parts, options.plot)
    grown = [name for name, found in parts.items() if growth(found) > LIMIT_MB]
    for name in grown:
        print(f"{name}: memory has grown by more than {LIMIT_MB} MB", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
