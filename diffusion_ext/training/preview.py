"""Pictures of what a run has learned so far, always from the same noise, and how much of them is
noise still."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..samplers import NoiseSchedule, StepTable, dpmpp_2m_sde, flow_euler
from ..sampling import sample
from ..sampling.pictures import sample_grid
from .config import TrainingConfig

FEW_STEPS, FLOW_STEPS = 10, 25  # docs/samplers.md: what images are best by
GUIDANCE = 2.0
COLUMNS, ROWS = 10, 4
LOOKED_AT = 200  # images of the data, for how rough they are themselves


def table_for(schedule: NoiseSchedule, prediction: str) -> StepTable:
    """The sampler of images in [-1, 1] that suits what a network predicts."""
    if prediction == "flow":
        return flow_euler(FLOW_STEPS, clip=1.0)
    steps = min(FEW_STEPS, schedule.timesteps)
    return dpmpp_2m_sde(schedule, steps, clip=1.0, prediction=prediction)


class Preview:
    """Draws a grid of samples: a column for each of the first ten classes, or for nothing.

    Args: as Trainer's.
    """

    def __init__(self, config: TrainingConfig, schedule: NoiseSchedule, data):
        self.table = table_for(schedule, config.prediction)
        self.guidance = GUIDANCE if config.context_keep < 1 else 1.0
        self.data = data
        self._rough: float | None = None  # of the data, once it is asked for

    def samples(self, model: nn.Module, device: torch.device) -> Tensor:
        """[columns·ROWS, C, S, S], of `model`."""
        context = self._context(self._columns, device)
        result = sample(
            model,
            (self._columns * ROWS, *self.data.shape),
            self.table,
            context=context,
            guidance_scale=1.0 if context is None else self.guidance,
            progress=False,
            device=device,
        )
        return result.images

    def picture(self, samples: Tensor) -> Image.Image:
        names = self.data.class_names[:COLUMNS]
        return sample_grid(visible(samples), self._columns, column_labels=names)

    def noise_in(self, samples: Tensor) -> float:
        """The share of the samples' roughness, from 0 to 1, that the data has not."""
        if self._rough is None:
            chosen = np.linspace(0, len(self.data) - 1, min(len(self.data), LOOKED_AT))
            (batch,) = self.data.batches([chosen.round().astype(np.int64)], samples.device)
            self._rough = roughness(batch.images)
        excess = roughness(samples.float().clamp(-1, 1)) - self._rough
        return min(max(excess / max(1 - self._rough, 1e-3), 0.0), 1.0)

    @property
    def _columns(self) -> int:
        return len(self.data.class_names[:COLUMNS]) or COLUMNS

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


def roughness(images: Tensor) -> float:
    """How much neighbours in [B,C,H,W] differ: half their mean squared difference, by the variance.
    It is 1 of white noise, and near 0 where neighbours are alike."""
    across, down = (images.diff(dim=dim).square().mean() / 2 for dim in (-1, -2))
    variance = images.var(dim=(-2, -1), correction=0).mean()
    return ((across + down) / 2 / variance.clamp(min=1e-6)).item()
