"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .checkpoints import Checkpoint
from .processes import Processes


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        losses, validation_losses: of each epoch; the latter are NaN where they were not measured.
        steps: updates of the weights. images: seen.
        skipped: updates that were left out, because the loss or gradient was not finite.
        batches, loss, loss_images: of the epoch that has begun: batches trained, the sum of their
            images' losses, on the device, and how many images that were: of this process's share.
    """

    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    skipped: int = 0
    batches: int = 0
    loss: Tensor | float = 0.0
    loss_images: int = 0

    @property
    def mean_loss(self) -> float:
        """Of the epoch so far, in this process; reading it waits for the device."""
        return float(self.loss) / self.loss_images if self.loss_images else math.nan

    def add(self, losses: Tensor) -> None:
        """losses: [B], of a step's images."""
        self.loss = self.loss + losses.sum()
        self.loss_images += len(losses)

    def end_epoch(self, loss: float) -> None:
        self.losses.append(loss)
        self.batches, self.loss, self.loss_images = 0, 0.0, 0

    def over(self, processes: Processes, device: torch.device) -> Progress:
        """That of all processes together; each of them has to ask."""
        if processes.count == 1:
            return self
        loss = processes.sum(torch.as_tensor(self.loss, device=device))
        return replace(self, loss=loss, loss_images=processes.sum_int(self.loss_images))

    def state(self) -> dict:
        """Its part of a Checkpoint."""
        return {
            "losses": list(self.losses),
            "validation_losses": list(self.validation_losses),
            "steps": self.steps,
            "samples_seen": self.images,
            "skipped_steps": self.skipped,
            "epoch_batches": self.batches,
            "epoch_loss": float(self.loss),
            "epoch_images": self.loss_images,
        }

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, whole: bool = True) -> Progress:
        """As `state` told; not whole: in a process beside the first, whose losses count there."""
        return cls(
            losses=list(checkpoint.losses),
            validation_losses=list(checkpoint.validation_losses),
            steps=checkpoint.steps,
            images=checkpoint.samples_seen,
            skipped=checkpoint.skipped_steps,
            batches=checkpoint.epoch_batches,
            loss=torch.tensor(checkpoint.epoch_loss if whole else 0.0, device=device),
            loss_images=checkpoint.epoch_images if whole else 0,
        )
