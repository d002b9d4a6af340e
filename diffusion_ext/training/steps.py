"""One update of the weights after another: the batches of each, and what became of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .config import TrainingConfig
from .data import ImageData, LazyData
from .draws import Draws, batches_of
from .learner import Learner
from .logs import LossMeter
from .loss_watch import LossWatch, TrainedBatch
from .optimizers import learning_rate
from .plan import batches_per_epoch, epochs_of, steps_per_epoch
from .processes import Processes
from .progress import Progress


@dataclass
class Steps:
    """The updates of a run's weights.

    A batch is that of all processes together: each trains its share of the images, with the draws
    that they would have had in one process.

    Args: as the run's. images: int64, those that are trained on.
    """

    config: TrainingConfig
    data: ImageData | LazyData
    images: np.ndarray
    draws: Draws
    learner: Learner
    progress: Progress
    processes: Processes
    watch: LossWatch

    def __post_init__(self) -> None:
        self._handed: deque[np.ndarray] = deque()  # to the data, which reads ahead
        self._batches = self.data.batches(self._remaining(), self.learner.device)

    def close(self) -> None:
        """Ends the processes that read ahead."""
        self._batches.close()

    def step(self, meter: LossMeter) -> Tensor | None:
        """One update of the weights. Returns the gradient's norm, where it is known.

        Raises: FloatingPointError for a loss that is not finite, unless such steps are skipped.
        """
        config, progress = self.config, self.progress
        first = progress.batches
        in_epoch = batches_per_epoch(config, len(self.images))
        batches = range(first, min(first + config.accumulate, in_epoch))
        sizes = [min(config.batch_size, len(self.images) - i * config.batch_size) for i in batches]
        rate = learning_rate(config, progress.steps, steps_per_epoch(config, len(self.images)))
        trained = []
        for i, size in zip(batches, sizes, strict=True):
            with self.learner.adding_up(last=i == batches[-1]):
                trained += self._backward(size, sum(sizes))
        progress.steps += 1
        if not config.skip_bad_steps:
            self.watch.look(progress.steps, rate, trained)
        want_norm = progress.steps % config.log_every == 0
        norm, updated = self.learner.update(progress.steps, rate, want_norm)
        progress.skipped += not updated
        for batch in trained if updated else ():
            progress.add(batch.trained)
            meter.add(batch.trained, batch.losses, batch.t)
        return norm

    def _backward(self, size: int, of: int) -> list[TrainedBatch]:
        """The gradients of this process's share of the next batch; [] where it has no image.

        Args: size: of the batch. of: images in the step.
        """
        progress, device = self.progress, self.learner.device
        in_epoch = batches_per_epoch(self.config, len(self.images))
        number = len(progress.losses) * in_epoch + progress.batches
        draws = self.draws.batch(number, progress.images, size, device)
        draws = draws.of(self.processes.share(size))
        batch, index = next(self._batches), self._handed.popleft()
        progress.batches += 1
        progress.images += size
        if batch.kept is not None:
            draws, index = draws.of(batch.kept), index[batch.kept.cpu().numpy()]
        torch.manual_seed(self.draws.torch_seed(number, self.processes.rank))
        if not len(batch):
            self.learner.stand_in()
            return []
        trained, losses = self.learner.backward(batch, draws, of)
        return [TrainedBatch(index, trained, losses, draws.t)]

    def _remaining(self) -> Iterator[np.ndarray]:
        """This process's images in every batch that is still to come, in this epoch and later."""
        skipped, size = self.progress.batches, self.config.batch_size
        epochs = epochs_of(self.config, len(self.images))
        for epoch in range(len(self.progress.losses), epochs):
            order = self.draws.order(epoch, self.images)
            for batch in list(batches_of(order, size))[skipped:]:
                mine = batch[self.processes.share(len(batch))]
                self._handed.append(mine)
                yield mine
            skipped = 0
