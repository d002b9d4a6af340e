"""The command `evaluate`: how good a run's samples are, as numbers and a report with pictures."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..nn import optimize_for_sampling
from ..sampling import sample
from ..sampling.engines import ENGINES
from ..sampling.pictures import sample_grid
from ..training import Checkpoint, TrainingConfig, load_checkpoint, load_trained
from ..training.draws import split
from ..training.evaluation import Evaluation, RealImages, evaluate, train_judge
from ..training.evaluation.bars import bars
from ..training.learner import Learner
from ..training.preview import visible
from ..training.validation import Validation
from ..training.weights_files import file_of
from .data_options import DataOptions, record_of
from .places import RUN, RunPath, device_of
from .report import write_report
from .sample_set import RECORD_NAME, read_samples
from .sampler_options import SamplerOptions

BATCH = 100  # images sampled at once
MOST_REAL = 20_000  # real images that samples are compared with
SHOWN = 8  # samples beside their nearest training images


@dataclass(frozen=True)
class Evaluate(SamplerOptions):
    """Measure a run: are its samples recognised, like the real images, and no copies of them?"""

    run_folder: RunPath = RUN
    """a folder that `train` wrote, or one of its checkpoints"""
    out: Path | None = None
    """folder for evaluation.json and report.html; default `evaluation` in the run's"""
    images: int = 1000
    """samples to draw, of the classes as often as the data has them"""
    samples: Path | None = None
    """measure these in place of drawn ones: a folder that `sample --count` wrote, or of pictures"""
    device: str = "auto"
    """torch device; auto is CUDA where there is one"""
    engine: Literal[ENGINES] = "eager"
    """what runs the network; auto measures them all once on this machine and takes the fastest"""

    def run(self) -> None:
        self.measure()

    def measure(self) -> Evaluation:
        """Draws, measures, writes the report and prints the numbers. Returns them."""
        if self.images < 1:
            raise ValueError(f"images: wanted at least 1, got {self.images}")
        path = file_of(self.run_folder)
        checkpoint, trained = load_checkpoint(path), load_trained(path)
        config = TrainingConfig(**checkpoint.training)
        data = DataOptions.of_record(record_of(path.parent, "run_folder")["data"]).load()
        kept, held = split(len(data), config)
        real = _real_images(data, kept, held)
        start = time.perf_counter()
        if self.samples is None:
            labels = real.labels_for(self.images)
            samples = self._samples(trained, labels)
        else:
            samples, labels = read_samples(self.samples, data.shape, trained.class_names)
        seconds = time.perf_counter() - start
        bar = bars(shown=True)
        found = evaluate(samples, labels, real, train_judge(real, bar), bar)
        numbers = {
            "run": str(self.run_folder),
            "steps": checkpoint.steps,
            "epochs": len(checkpoint.losses),
            "sampler": {**self._sampler(trained), "seconds": round(seconds, 1)},
            "validation_loss": _validation_loss(checkpoint, config, data, held, self.device),
            **{k: v for k, v in asdict(found).items() if k != "nearest"},
            "data": list(data.notes),
        }
        out = self.out or path.parent / "evaluation"
        out.mkdir(parents=True, exist_ok=True)
        (out / "evaluation.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
        grids = _grids(samples, labels, trained.class_names, real, found)
        lines = write_report(out / "report.html", numbers, grids)
        print("\n".join(lines))
        print(f"report      {out / 'report.html'}")
        return found

    def _sampler(self, trained) -> dict:
        """What the samples were drawn by, as far as it is known."""
        if self.samples is None:
            return {**self.record(trained), "engine": self.engine}
        record = self.samples / RECORD_NAME
        told = json.loads(record.read_text(encoding="utf-8"))["sampler"] if record.is_file() else {}
        return {**told, "samples": str(self.samples)}

    def _samples(self, trained, labels: Tensor | None) -> Tensor:
        """[N,C,S,S] on the CPU, of seeds that count up from this command's."""
        model = trained.model.to(device_of(self.device), memory_format=torch.channels_last)
        optimized = self.engine == "eager"  # the other engines make their own of the model
        fast = optimize_for_sampling(model, batch=BATCH) if optimized else model
        table = self.table(trained)
        drawn = []
        bar = tqdm(range(0, self.images, BATCH), desc="sampling", unit="batch")
        for first in bar:
            count = min(BATCH, self.images - first)
            context = None if labels is None else labels[first : first + count]
            result = sample(
                fast,
                (count, model.in_channels, model.height, model.height),
                table,
                context=context,
                guidance_scale=1.0 if context is None else self.guidance,
                seeds=self.seed + first,
                engine=self.engine,
                progress=False,
            )
            drawn.append(result.images.float().cpu())
        return torch.cat(drawn)


def _real_images(data, kept: np.ndarray, held: np.ndarray) -> RealImages:
    def read(indices: np.ndarray) -> tuple[Tensor, Tensor | None]:
        indices = indices[:: max(-(-len(indices) // MOST_REAL), 1)]
        (batch,) = data.batches([indices], torch.device("cpu"))
        labels = batch.context.argmax(1) if data.class_names else None
        return batch.images, labels

    images, labels = read(kept)
    if not len(held):
        return RealImages.without_split(images, labels)
    held_images, held_labels = read(held)
    return RealImages(images, held_images, labels, held_labels)


def _validation_loss(
    checkpoint: Checkpoint, config: TrainingConfig, data, held: np.ndarray, device: str
) -> float | None:
    if not len(held):
        return None
    place = device_of(device)
    learner = Learner(checkpoint.build_model().train(), config, checkpoint.schedule, place)
    timesteps = checkpoint.schedule.timesteps
    validation = Validation(data, held, learner.objective, timesteps, config.batch_size)
    return validation.loss(learner.predict_averaged, place)


def _grids(samples, labels, names, real: RealImages, found: Evaluation) -> dict:
    """Pictures by their titles."""
    spread = torch.linspace(0, len(samples) - 1, min(len(samples), 100)).long()
    grids = {"Samples": sample_grid(visible(samples[spread]), 10)}
    closest = found.nearest.distance.argsort()[:SHOWN]
    pool = torch.cat([real.trained, real.held_out]) if real.seen_by_run else real.trained
    beside = torch.cat([samples[closest], pool[found.nearest.index[closest]]])
    rows = ("sample", "real")
    title = "The samples nearest to a training image, and that image"
    grids[title] = sample_grid(visible(beside), len(closest), row_labels=rows)
    return grids
