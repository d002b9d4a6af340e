"""The samples that a run keeps on its way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Frames:
    """A sample's place on the CPU for each step that is kept; a GPU is not waited for meanwhile.

    Args:
        timesteps: of the run's steps, numbered from `first_step`. save_rate: as for `sample`.
        x: like the samples.
    """

    def __init__(self, timesteps: list[int], first_step: int, save_rate: int | None, x: Tensor):
        self._places, self.timesteps = {}, []
        for i, timestep in enumerate(timesteps[first_step:], first_step):
            if save_rate is not None and (i == first_step or _keeps(timestep, save_rate)):
                self._places[i] = len(self.timesteps)
                self.timesteps.append(timestep)
        # Only from pinned memory on can a copy go on while the host does.
        pinned = x.is_cuda and bool(self.timesteps)
        self._kept = torch.empty(
            (len(self.timesteps), *x.shape), dtype=x.dtype, device="cpu", pin_memory=pinned
        )
        self._copied = torch.cuda.Event() if pinned else None

    def keep(self, i: int, x: Tensor) -> None:
        if i not in self._places:
            return
        self._kept[self._places[i]].copy_(x.detach(), non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(x.device))

    def result(self) -> tuple[Tensor, np.ndarray]:
        """(the samples [F, *] on the CPU, int64 [F] their timesteps); waits for the last copy."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._kept, np.array(self.timesteps, dtype=np.int64)


def _keeps(timestep: int, save_rate: int) -> bool:
    return timestep % save_rate == 0 or timestep < 8
