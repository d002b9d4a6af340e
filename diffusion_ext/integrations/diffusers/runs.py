"""What a scheduler's run is, as the host knows it, and the tables it keeps on the devices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...samplers.schedules import is_lasting
from .rows import UNKNOWN

__all__ = ["DeviceTensors", "Run", "known_place", "on_host"]


class DeviceTensors:
    """Tensors that are made once for each device."""

    def __init__(self):
        self._tensors: dict = {}

    def tensor(self, name, device, dtype, values: Callable[[], np.ndarray]) -> Tensor:
        """values() as a tensor on `device`, put there once, without waiting for the device."""
        key = (name, device, dtype)
        if (known := self._tensors.get(key)) is not None:
            return known
        with torch.inference_mode(False):  # so that it may serve outside that mode too
            tensor = torch.tensor(values(), dtype=dtype).to(device, non_blocking=True)
        if is_lasting(tensor):
            self._tensors[key] = tensor
        return tensor


def known_place(timestep: Tensor, timesteps: Tensor) -> int | None:
    """Where in `timesteps` [n] a view of one element lies; None for another tensor.

    Pipelines walk over `scheduler.timesteps`: what they pass are views of it, whose place in its
    storage says which one it is, without a wait for the device.
    """
    if timestep.dtype != timesteps.dtype or _storage(timestep) != _storage(timesteps):
        return None
    if timestep.numel() != 1:
        return None
    place, rest = divmod(
        timestep.storage_offset() - timesteps.storage_offset(), timesteps.stride(0)
    )
    return place if rest == 0 and 0 <= place < len(timesteps) else None


def on_host(alpha_bar: Tensor, exact: bool) -> np.ndarray:
    """alphas_cumprod in the dtype to compute with: float64 where exact, else no less than float32,
    as the schedulers' own are."""
    own = torch.promote_types(alpha_bar.dtype, torch.float32)
    return alpha_bar.detach().cpu().to(torch.float64 if exact else own).numpy()


class Run(DeviceTensors):
    """A scheduler's timesteps and ᾱ at one time; whatever of it changes, a new Run replaces it.

    Attributes:
        timesteps: int64 [n], the host's copy of the scheduler's.
        alpha_bar: [T], the scheduler's alphas_cumprod, of the dtype to compute with.
        previous: int64 [T], where the step from each timestep leads (see rows).
    """

    def __init__(self, held: tuple, timesteps: np.ndarray, previous: np.ndarray, exact: bool):
        super().__init__()
        self._held, self._versions = held, _versions(held)
        self.timesteps = timesteps
        self.alpha_bar = on_host(held[1], exact)
        self.previous = previous

    def holds(self, held: tuple) -> bool:
        """Whether the scheduler's timesteps, alphas_cumprod and settings are still these."""
        pairs = zip(self._held, held, strict=True)
        same = all(a is b or (isinstance(a, int) and a == b) for a, b in pairs)
        # A tracer guards what it has read by identity; it cannot ask how often that was written.
        return same and (torch.compiler.is_compiling() or self._versions == _versions(held))

    def read(self, timestep) -> int | None:
        """A timestep as an int, without waiting for a device; None for one that only it knows."""
        if not isinstance(timestep, Tensor):
            return timestep.__index__()
        if torch.compiler.is_compiling():
            return None
        place = known_place(timestep, self._held[0])
        if place is not None:
            return int(self.timesteps[place])
        return int(timestep) if timestep.device.type == "cpu" else None

    def check(self, t: int) -> None:
        """Raise IndexError for a timestep that the run has no step from."""
        if not 0 <= t < len(self.previous) or self.previous[t] == UNKNOWN:
            raise IndexError(f"timestep: wanted one of the scheduler's timesteps, got {t}")

    def table(self, options: tuple, device, dtype, weights: Callable[..., np.ndarray]):
        """(coefficients [T, 7], steps [T]) on `device`, for sampler_step."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        table = self.tensor(("table", *options), device, dtype, lambda: weights(self, *options))
        return table, self.steps(device)

    def rows(self, device) -> Tensor:
        """0..T-1 on `device`: element t is the row of timestep t."""
        return self.tensor("rows", device, torch.int64, lambda: np.arange(len(self.previous)))

    def steps(self, device) -> Tensor:
        """1..T on `device`: diffusers counts timesteps from 0, the noise contract from 1."""
        return self.tensor("steps", device, torch.int64, lambda: np.arange(len(self.previous)) + 1)


def _versions(held: tuple) -> tuple:
    """Counts of what was written into the run's timesteps and alphas_cumprod."""
    return tuple(None if tensor.is_inference() else tensor._version for tensor in held[:2])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
