"""The loss on images that are held out, always of the same noise at the same timesteps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..ops.wide import wide, wide_device
from .draws import batches_of
from .objective import Objective
from .processes import Processes

LEAST_DRAWS = 256  # images are noised several times where fewer are held out
FIRST_SEED = 1 << 62  # beyond the seeds of training


class Validation:
    """The validation of a run.

    Args:
        data: of the run. images: int64, those held out.
        timesteps: T, through which the images of the split are spread evenly.
        batch_size: as in training, that of all processes together.
        processes: each takes its share of the images.
    """

    def __init__(
        self,
        data,
        images: np.ndarray,
        objective: Objective,
        timesteps: int,
        batch_size: int,
        processes: Processes | None = None,
    ):
        self.data, self.objective = data, objective
        self.processes = processes or Processes()
        self.batch_size = batch_size
        times = -(-LEAST_DRAWS // max(len(images), 1))
        self.order = np.tile(images, times)
        count = len(self.order)
        # Of the golden ratio, so that neighbours, and an image's repetitions, lie far apart.
        share = np.arange(count) * 0.6180339887498949 % 1
        self.t = 1 + np.floor(share * timesteps).astype(np.int64)
        self.seeds = FIRST_SEED + np.arange(count)

    def __len__(self) -> int:
        return len(self.order)

    @torch.no_grad()
    def loss(
        self, predict: Callable, device: torch.device, stand_in: Callable = lambda: None
    ) -> float:
        """The mean loss, not weighted.

        Args:
            predict: (x_t, t, context), in evaluation mode.
            stand_in: called in its place where a process has no image of a batch.
        """
        total, count = torch.zeros((), device=wide_device(device), dtype=torch.float64), 0
        # Each process's share of every batch: all of them call the network equally often, which a
        # cut one wants.
        places = [
            batch[self.processes.share(len(batch))]
            for batch in batches_of(np.arange(len(self.order)), self.batch_size)
        ]
        batches = self.data.batches([self.order[p] for p in places], device)
        for place, batch in zip(places, batches, strict=True):
            t, seeds = (torch.from_numpy(a[place]).to(device) for a in (self.t, self.seeds))
            if batch.kept is not None:
                t, seeds = t[batch.kept], seeds[batch.kept]
            if not len(batch):
                stand_in()
                continue
            x_t = self.objective.noised(batch.images, t, seeds)
            losses = self.objective.losses(predict(x_t, t, batch.context), batch.images, t, seeds)
            total += wide(losses).sum()
            count += len(batch)
        total, count = self.processes.sum(total), self.processes.sum_int(count)
        return total.item() / count if count else float("nan")
