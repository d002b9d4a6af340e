"""StepTable: a sampler as one row of numbers per step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from ..ops.sampler_step import COLUMNS
from .schedules import is_lasting


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: the timesteps and one row of coefficients per step.

    Attributes:
        timesteps: int64 [n], the step word of each step's noise: on a schedule its timestep.
        weights: float64 [n, 7], in the order of `COLUMNS`.
        clip: x0 is clipped to [-clip, clip]; None for no clipping.
        train_timesteps: T of the schedule.
        times: float64 [n], what the model is given before each step; by default timesteps/T.
        levels: float64 [n+1, 2], signal and sigma of the sample before each step and after the
            last: x = signal·x0 + sigma·ε. None where they are not known.
    """

    timesteps: np.ndarray
    weights: np.ndarray
    clip: float | None
    train_timesteps: int
    times: np.ndarray | None = None
    levels: np.ndarray | None = None
    _tensors: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.times is None:
            object.__setattr__(self, "times", self.timesteps / self.train_timesteps)
        for name in ("timesteps", "weights", "times", "levels"):
            if getattr(self, name) is None:
                continue
            frozen = getattr(self, name).copy()
            frozen.setflags(write=False)
            object.__setattr__(self, name, frozen)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def multistep(self) -> bool:
        """Whether a step looks back at the data prediction of the one before."""
        return bool((self.weights[:, COLUMNS.index("ah")] != 0).any())

    @property
    def coefficients(self) -> np.ndarray:
        """float32 [n, 7]: the weights as the kernels read them, whatever the sample's dtype."""
        return self.weights.astype(np.float32)

    def tensors(self, device, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients [n, 7], timesteps int64 [n]) on `device`, copied there once.

        The coefficients are float32, or float64 where the samples' dtype is.
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return self._on(device, "weights", dtype), self._on(device, "timesteps", torch.int64)

    def run_tensors(self, device, dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(times [n], levels [n+1, 2] or None) on `device`, copied there once.

        They are float32 at least: half precision cannot tell one timestep of a thousand from the
        next.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        levels = None if self.levels is None else self._on(device, "levels", dtype)
        return self._on(device, "times", dtype), levels

    def _on(self, device, name: str, dtype: torch.dtype) -> torch.Tensor:
        key = (torch.device(device), name, dtype)
        if key in self._tensors:
            return self._tensors[key]
        tensor = torch.from_numpy(getattr(self, name).copy()).to(device, dtype)
        if is_lasting(tensor):
            self._tensors[key] = tensor
        return tensor
