"""The random draws of a run, each a function of the seed and of where in the run it is: a run that
is stopped and resumed draws what it would have drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import moved
from .config import MAX_SEED, TrainingConfig

# What the generators of a run are for: a run's seed, one of these, and a number.
ORDER, BATCH, MODEL, SPLIT = range(4)

DrawTimesteps = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class BatchDraws:
    """What is drawn for the images of a batch, on the device.

    Attributes:
        t: int64 [B], from 1 to T. seeds: int64 [B], of the noise. keep: bool [B], whether an image
        keeps its context. flip: bool [B].
    """

    t: Tensor
    seeds: Tensor
    keep: Tensor
    flip: Tensor

    def of(self, kept: Tensor | slice) -> BatchDraws:
        """Those of some of the images: kept, int64 on the device, or a slice."""
        return BatchDraws(self.t[kept], self.seeds[kept], self.keep[kept], self.flip[kept])


class Draws:
    """The draws of a run.

    Args:
        timesteps: T.
        draw_timesteps: (generator, n) -> n integers from 1 to T, in place of the config's way.
    """

    def __init__(
        self, config: TrainingConfig, timesteps: int, draw_timesteps: DrawTimesteps | None = None
    ):
        self.config, self.timesteps = config, timesteps
        self.draw_timesteps = draw_timesteps or self._by_config

    def order(self, epoch: int, images: np.ndarray) -> np.ndarray:
        """The images, in the order of an epoch."""
        return generator(self.config, ORDER, epoch).permutation(images)

    def batch(self, number: int, first: int, count: int, device: torch.device) -> BatchDraws:
        """Those of the run's batch `number`, before which `first` images were seen.

        An image's noise has a seed of its own in the run, so that no noise comes twice.
        """
        random = generator(self.config, BATCH, number)
        drawn = np.empty((4, count), np.int64)
        drawn[0] = self._checked(self.draw_timesteps(random, count), count)
        drawn[1] = (self.config.seed << 32) + first + np.arange(count)
        drawn[2] = random.random(count) < self.config.context_keep
        drawn[3] = self.config.flip & (random.random(count) < 0.5)
        t, seeds, keep, flip = moved(torch.from_numpy(drawn), device)  # one transfer
        return BatchDraws(t, seeds, keep.bool(), flip.bool())

    def torch_seed(self, number: int, process: int) -> int:
        """For what draws inside the network in a batch, such as dropout, in each process."""
        return int(generator(self.config, MODEL, number, process).integers(MAX_SEED))

    def _by_config(self, random: np.random.Generator, count: int) -> np.ndarray:
        if self.config.timestep_sampling == "uniform":
            return random.integers(1, self.timesteps + 1, count)
        share = 1 / (1 + np.exp(-random.standard_normal(count)))
        return np.ceil(share * self.timesteps).clip(1, self.timesteps)

    def _checked(self, t, count: int) -> np.ndarray:
        t = np.asarray(t)
        if t.shape != (count,) or (count and not (t.min() >= 1 and t.max() <= self.timesteps)):
            raise ValueError(
                f"draw_timesteps: wanted {count} integers from 1 to {self.timesteps}, got {t}"
            )
        return t


def batches_of(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The order in batches; the last may be smaller."""
    return (order[i : i + size] for i in range(0, len(order), size))


def split(count: int, config: TrainingConfig) -> tuple[np.ndarray, np.ndarray]:
    """(the images to train on, those held out), int64: `validation` of `count`."""
    held = round(config.validation * count)
    order = generator(config, SPLIT, 0).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def generator(config: TrainingConfig, what: int, *numbers: int) -> np.random.Generator:
    return np.random.default_rng((config.seed, what, *numbers))
