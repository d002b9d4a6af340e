"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoints import Checkpoint


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        losses, validation_losses: of each epoch.
        steps: updates of the weights. images: seen.
        batches, loss, loss_images: of the epoch that has begun: batches trained, the sum of their
            images' losses, on the device, and how many images that were.
    """

    losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    batches: int = 0
    loss: Tensor | float = 0.0
    loss_images: int = 0

    @property
    def mean_loss(self) -> float:
        """Of the epoch so far; reading it waits for the device."""
        return float(self.loss) / self.loss_images if self.loss_images else math.nan

    def end_epoch(self, loss: float) -> None:
        self.losses.append(loss)
        self.batches, self.loss, self.loss_images = 0, 0.0, 0

    def state(self) -> dict:
        """Its part of a Checkpoint."""
        return {
            "losses": list(self.losses),
            "validation_losses": list(self.validation_losses),
            "steps": self.steps,
            "samples_seen": self.images,
            "epoch_batches": self.batches,
            "epoch_loss": float(self.loss),
            "epoch_images": self.loss_images,
        }

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device) -> Progress:
        """As `state` told."""
        return cls(
            losses=list(checkpoint.losses),
            validation_losses=list(checkpoint.validation_losses),
            steps=checkpoint.steps,
            images=checkpoint.samples_seen,
            batches=checkpoint.epoch_batches,
            loss=torch.tensor(checkpoint.epoch_loss, device=device),
            loss_images=checkpoint.epoch_images,
        )
