"""Pictures of what a run has learned so far, always from the same noise."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn

from ..samplers import NoiseSchedule, StepTable, ddim, flow_euler
from ..sampling import sample
from ..sampling.pictures import sample_grid
from .config import TrainingConfig

STEPS, GUIDANCE = 25, 2.0
COLUMNS, ROWS = 10, 4


def table_for(schedule: NoiseSchedule, prediction: str, steps: int = STEPS) -> StepTable:
    """A sampler of images in [-1, 1] that suits what a network predicts: DDIM, or Euler's."""
    if prediction == "flow":
        return flow_euler(steps, clip=1.0)
    return ddim(schedule, min(steps, schedule.timesteps), clip=1.0, prediction=prediction)


class Preview:
    """Draws a grid of samples: a column for each of the first ten classes, or for nothing.

    Args: as Trainer's.
    """

    def __init__(self, config: TrainingConfig, schedule: NoiseSchedule, data):
        self.table = table_for(schedule, config.prediction)
        self.guidance = GUIDANCE if config.context_keep < 1 else 1.0
        self.data = data

    def draw(self, model: nn.Module, device: torch.device) -> Image.Image:
        """A grid of `model`'s samples."""
        names = self.data.class_names[:COLUMNS]
        columns = len(names) or COLUMNS
        context = self._context(columns, device)
        result = sample(
            model,
            (columns * ROWS, *self.data.shape),
            self.table,
            context=context,
            guidance_scale=1.0 if context is None else self.guidance,
            progress=False,
            device=device,
        )
        return sample_grid(visible(result.images), columns, column_labels=names)

    def _context(self, columns: int, device: torch.device) -> Tensor | None:
        """[columns·ROWS, *], a row of the grid after the other; None without contexts."""
        if self.data.context_shape is None:
            return None
        if self.data.class_names:
            one_hot = torch.eye(len(self.data.class_names), device=device)
            return one_hot[:columns].repeat(ROWS, 1)
        indices = torch.arange(columns * ROWS).remainder(len(self.data)).numpy()
        (batch,) = self.data.batches([indices], device)
        return batch.context


def visible(images: Tensor) -> Tensor:
    """The first one or three channels of [B,C,H,W]."""
    return images[:, : 3 if images.shape[1] >= 3 else 1]
