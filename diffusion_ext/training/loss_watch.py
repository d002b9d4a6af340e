"""Sees at each step that the loss is finite, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NAMED = 32  # images at most, in a message


@dataclass
class TrainedBatch:
    """A batch whose gradients are there. index: int64 [B], its images; the rest: [B] on the device,
    the losses as they are trained and as they are, and the timesteps."""

    index: np.ndarray
    trained: Tensor
    losses: Tensor
    t: Tensor


@dataclass
class _Seen:
    step: int
    learning_rate: float
    batches: list[TrainedBatch]
    total: Tensor  # [] on the host, once the event has come
    event: torch.cuda.Event | None


class LossWatch:
    """The watch of a run.

    On a GPU a step's loss is read after the next step was handed to it, so that nobody waits; the
    weights have then gone bad, but no checkpoint has: `settle` comes first.

    Args:
        name_of: of an image, by its index.
        last_checkpoint: tells what to go back to.
    """

    def __init__(self, name_of: Callable[[int], str], last_checkpoint: Callable[[], str]):
        self.name_of, self.last_checkpoint = name_of, last_checkpoint
        self._seen: _Seen | None = None

    def look(self, step: int, learning_rate: float, batches: list[TrainedBatch]) -> None:
        """Before the step's update of the weights.

        Raises: FloatingPointError for this step's loss or, on a GPU, that of the step before.
        """
        self.settle()
        if not batches:
            return
        total, event = torch.stack([b.trained.detach().sum() for b in batches]).sum(), None
        if total.device.type == "cuda":
            total = total.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._seen = _Seen(step, learning_rate, batches, total, event)
        if event is None:
            self.settle()

    def settle(self) -> None:
        """Reads what is pending. Raises: FloatingPointError where it is not finite."""
        seen, self._seen = self._seen, None
        if seen is None:
            return
        if seen.event is not None:
            seen.event.synchronize()  # a whole step ago
        if not np.isfinite(seen.total.numpy()):
            raise FloatingPointError(self._message(seen))

    def _message(self, seen: _Seen) -> str:
        losses = torch.cat([b.trained for b in seen.batches]).float().cpu().numpy()
        t = torch.cat([b.t for b in seen.batches]).cpu().numpy()
        index = np.concatenate([b.index for b in seen.batches])
        (bad,) = np.nonzero(~np.isfinite(losses))
        lines = [f"  {self.name_of(index[i])}, timestep {t[i]}" for i in bad[:NAMED]]
        more = [f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        worst = losses[bad[0]] if len(bad) else losses.sum()
        return "\n".join(
            [
                f"the loss of step {seen.step} is {worst}, at learning rate "
                f"{seen.learning_rate:g}, for {len(bad)} of {len(losses)} images:",
                *lines,
                *more,
                f"{self.last_checkpoint()} Try a lower learning rate, clip_gradient, or "
                "skip_bad_steps, which leaves such steps out.",
            ]
        )
