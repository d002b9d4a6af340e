"""What a run tells people: its configuration, and a line for each checkpoint."""

from __future__ import annotations

import math
import os
import socket
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..version import __version__
from .compatibility import configuration_of
from .plan import steps_per_epoch
from .sharding import class_name

UNTIMED, TIMED = 2, (3, 2.0)  # steps that warm up; steps and seconds at least, of a forecast

if TYPE_CHECKING:
    from .trainer import Trainer


def description(run: Trainer) -> dict:
    """What config.json tells."""
    return {
        "diffusion_ext": __version__,
        "torch": torch.__version__,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "processes": run.processes.count,
        "model": {"class": class_name(run.model), **configuration_of(run.model)},
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "timesteps": run.schedule.timesteps,
        "training": asdict(run.config),
        "images": len(run.images),
        "held_out": len(run.data) - len(run.images),
        "shape": list(run.data.shape),
        "classes": list(run.data.class_names),
        **run.about,
    }


def place(run: Trainer) -> dict[str, float]:
    """Where a run is."""
    state = run.progress
    epoch = round(run.epoch + state.batches / run.batches_per_epoch, 4)
    return {"step": state.steps, "epoch": epoch, "images": state.images}


def known(run: Trainer) -> dict[str, float]:
    """What the host knows, for a line of the log."""
    numbers = {**place(run), "learning_rate": run.learner.optimizer.param_groups[0]["lr"]}
    if run.learner.sum is not None:
        seconds = run.learner.sum.take_seconds()
        numbers["communication_ms"] = round(1000 * seconds / run.config.log_every, 3)
    if run.config.skip_bad_steps:
        numbers["skipped_steps"] = run.progress.skipped
    return numbers


def progress_bar(run: Trainer, shown: bool) -> tqdm:
    """Of a run's steps, where stderr is a terminal."""
    return tqdm(
        total=run.config.steps,
        initial=run.steps,
        desc="training",
        unit=" steps",
        leave=False,
        mininterval=0.5,
        disable=None if shown else True,  # None: only where stderr is no terminal
    )


class Forecast:
    """Says once, after the first steps, how long a run will take."""

    def __init__(self, run: Trainer, shown: bool):
        self._run, self._wanted = run, shown
        self._first, self._start = run.steps, 0.0

    def look(self) -> None:
        """After a step, whose end the loss's watch has seen."""
        if not self._wanted:
            return
        timed = self._run.steps - self._first - UNTIMED
        if timed == 0:
            self._start = time.perf_counter()
        seconds = time.perf_counter() - self._start
        if timed >= TIMED[0] and seconds >= TIMED[1]:
            left = (self._run.config.steps - self._run.steps) * seconds / timed
            tqdm.write(
                f"about {tqdm.format_interval(left)} to go, at {seconds / timed:.2g} s a step"
            )
            self._wanted = False


class Pace:
    """How many images a second a run trains, between one line and the next."""

    def __init__(self):
        self._images, self._seconds = 0, 0.0

    def add(self, images: int, seconds: float) -> None:
        self._images, self._seconds = self._images + images, self._seconds + seconds

    def take(self) -> float:
        """Images a second since it was last taken; 0 where a resumed run found all trained."""
        speed = self._images / self._seconds if self._images else 0.0
        self._images, self._seconds = 0, 0.0
        return speed


def progress_line(
    run: Trainer, loss: float, held_out: float, noise: float | None, speed: float
) -> str:
    """How far a run has come, and how long the rest will take.

    Args:
        loss, held_out: of the last epoch; NaN where none is held out.
        noise: in a picture of samples, as a share; None where none was made.
        speed: images a second.
    """
    config = run.config
    parts = [f"step {run.steps:{len(str(config.steps))}}/{config.steps}", f"loss {loss:.4f}"]
    if not math.isnan(held_out):
        parts.append(f"held out {held_out:.4f}")
    if run.progress.skipped:
        parts.append(f"{run.progress.skipped} of {run.steps} steps skipped")
    if noise is not None:
        parts.append(f"samples {noise:.0%} noise")
    if run.steps < config.steps and speed:
        images = len(run.images) / steps_per_epoch(config, len(run.images))  # of a step
        parts.append(f"{tqdm.format_interval((config.steps - run.steps) * images / speed)} left")
    return "  ".join([*parts, f"{speed:.0f} images/s"])
