"""What min-SNR weighting, the average and guidance each bring, on emoji of 16x16.

    python -m benchmarks.training_curves build/curves docs/images/training_curves.png

Two runs of the same network, with and without min-SNR weighting (ten minutes on two cores;
those that are in the folder already are not trained again). Every 20 epochs 500 samples are
measured as `diffusion-ext evaluate` does, by one feature network for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import diffusion_ext as dx
from diffusion_ext.training import Checkpoint, Trainer, TrainingConfig, load_checkpoint, load_emoji
from diffusion_ext.training.draws import split
from diffusion_ext.training.evaluation import Judge, RealImages, evaluate, train_judge
from diffusion_ext.training.run_folder import CHECKPOINT_NAME

EPOCHS, EVERY, FEATURES, SAMPLES, BATCH = 80, 20, 32, 500, 100
GUIDANCE, SCALES = 2.0, (1.0, 1.5, 2.0, 3.0, 5.0)
SCHEDULE = dx.NoiseSchedule.cosine(500)
COMMON = {
    "epochs": EPOCHS, "batch_size": 64, "prediction": "v", "lr_schedule": "cosine", "warmup": 100,
    "ema_decay": 0.999, "validation": 0.1, "checkpoint_every": EVERY, "keep": EPOCHS,
}  # fmt: skip
RUNS = {"all timesteps alike": {}, "min-SNR 5": {"min_snr": 5.0}}


def trained(name: str, folder: Path, data) -> list[tuple[int, Checkpoint]]:
    """(epoch, checkpoint) of a run."""
    torch.manual_seed(0)
    network = dx.nn.ContextUnet(3, FEATURES, len(data.class_names), 16, norm="group")
    place = folder / name.replace(" ", "-")
    trainer = Trainer(network, SCHEDULE, data, place, TrainingConfig(**COMMON, **RUNS[name]))
    trainer.fit(resume=(place / CHECKPOINT_NAME).exists())
    found = [load_checkpoint(path) for path in place.glob("checkpoint*.safetensors")]
    return sorted(((len(c.losses), c) for c in found), key=lambda pair: pair[0])


def real_images(data) -> RealImages:
    config = TrainingConfig(**COMMON)
    kept, held = map(torch.from_numpy, split(len(data), config))
    labels = data.contexts.argmax(1)
    return RealImages(data.images[kept], data.images[held], labels[kept], labels[held])


def measured(checkpoint: Checkpoint, weights: str, guidance: float, real, judge: Judge) -> dict:
    """Fréchet distance and recognition of samples by the average's weights, or the model's own."""
    network = dx.nn.ContextUnet(**checkpoint.model_configuration)
    network.load_state_dict(getattr(checkpoint, weights))
    network = dx.optimize_for_sampling(network.eval(), batch=BATCH)
    table = dx.ddim(SCHEDULE, 25, clip=1.0, prediction="v")
    labels = real.labels_for(SAMPLES)
    drawn = []
    for first in range(0, SAMPLES, BATCH):
        some = labels[first : first + BATCH]
        options = {"seeds": first, "progress": False}
        drawn.append(dx.sample(network, (BATCH, 3, 16, 16), table, some, guidance, **options))
    found = evaluate(torch.cat([d.images for d in drawn]), labels, real, judge)
    return {"frechet": found.frechet, "recognised": found.recognised, "copies": found.copies}


def measure(folder: Path) -> dict:
    data = load_emoji(16)
    real = real_images(data)
    runs = {name: trained(name, folder, data) for name in RUNS}
    judge = train_judge(real)
    by_epoch = {
        f"{name}, {what}": [
            {"epoch": epoch, **measured(checkpoint, weights, GUIDANCE, real, judge)}
            for epoch, checkpoint in tqdm(runs[name], desc=f"{name}, {what}")
        ]
        for name, weights, what in (
            ("all timesteps alike", "ema", "average"),
            ("min-SNR 5", "ema", "average"),
            ("min-SNR 5", "model", "last weights"),
        )
    }
    _, last = runs["min-SNR 5"][-1]
    by_scale = [
        {"guidance": scale, **measured(last, "ema", scale, real, judge)}
        for scale in tqdm(SCALES, desc="guidance")
    ]
    held = evaluate(real.held_out, real.held_out_labels, real, judge)
    return {
        "by_epoch": by_epoch,
        "by_scale": by_scale,
        "real": {"frechet": held.frechet, "recognised": held.recognised},
    }


def plot(found: dict, path: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    names = list(found["by_epoch"])
    for axes, pair, title in (
        (left, names[:2], "min-SNR weighting"),
        (middle, names[1:], "the average of the weights"),
    ):
        for name, ink in zip(pair, ("#3465a4", "#cc7a00"), strict=True):
            rows = found["by_epoch"][name]
            epochs = [row["epoch"] for row in rows]
            axes.plot(epochs, [row["frechet"] for row in rows], "o-", color=ink, label=name)
        axes.axhline(found["real"]["frechet"], color="#888", linestyle=":", label="real, held out")
        axes.set(xlabel="epoch", ylabel="Fréchet distance", title=title, ylim=(0, None))
    scales = [row["guidance"] for row in found["by_scale"]]
    recognised = [100 * row["recognised"] for row in found["by_scale"]]
    right.plot(scales, recognised, "o-", color="#3465a4", label="recognised, %")
    right.axhline(
        100 * found["real"]["recognised"], color="#888", linestyle=":", label="real, held out"
    )
    other = right.twinx()
    distances = [row["frechet"] for row in found["by_scale"]]
    other.plot(scales, distances, "s--", color="#cc7a00", label="Fréchet distance")
    other.set(ylim=(0, None))
    right.set(xlabel="guidance", title="guidance", ylim=(0, 100))
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    for axes in (left, middle):
        axes.legend(frameon=False, fontsize=8)
    lines = [*right.get_lines(), *other.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the runs and curves.json")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.folder)
    (arguments.folder / "curves.json").write_text(json.dumps(found, indent=2))
    plot(found, arguments.picture)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
