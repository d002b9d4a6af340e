"""What a scheduler's run is, as the host knows it, and the tables it keeps on the devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...samplers.schedules import is_lasting
from .rows import UNKNOWN

__all__ = ["HeldRun", "TableRun", "known_place", "on_host", "on_the_host", "put_on"]


# What the weights of a run are made of and a user might replace in the middle of it.
HELD = ("timesteps", "sigmas", "alphas_cumprod", "final_alpha_cumprod")
HELD += ("num_inference_steps", "custom_timesteps", "exact_coefficients", "_internal_dict")


class HeldRun:
    """A scheduler at one time; whatever of it is in HELD changes, a new run replaces it."""

    def __init__(self):
        self._tensors: dict = {}

    def hold(self, scheduler) -> None:
        """Remember by identity what the scheduler has now."""
        attributes = vars(scheduler)
        self._held = [(name, attributes[name]) for name in HELD if name in attributes]
        tensors = [value for _, value in self._held if isinstance(value, Tensor)]
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]

    def holds(self, attributes: dict) -> bool:
        """Whether the scheduler's attributes are still those, and were not written into."""
        for name, value in self._held:  # all(...) of a generator takes twice the time
            now = attributes[name]
            if now is not value and not (isinstance(value, int) and now == value):
                return False
        if torch.compiler.is_compiling():
            return True  # a tracer guards what it has read; it cannot ask how often it was written
        for tensor, version in self._versions:  # noqa: SIM110
            if tensor._version != version:
                return False
        return True

    def tensor(self, name, device, dtype, values: Callable[[], np.ndarray]) -> Tensor:
        """values() as a tensor on `device`, put there once, without waiting for the device."""
        key = (name, device, dtype)
        if (known := self._tensors.get(key)) is not None:
            return known
        with contextlib.nullcontext() if torch.compiler.is_compiling() else on_the_host():
            numbers = values()
        tensor = put_on(torch.as_tensor(numbers, device="cpu").to(dtype), device)
        if is_lasting(tensor):
            self._tensors[key] = tensor
        return tensor


@contextlib.contextmanager
def on_the_host():
    """For what the host computes for a step, which is no part of what the caller computes: its
    modes, default device and inference mode do not reach in here."""
    with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
        yield


def put_on(tensor: Tensor, device) -> Tensor:
    """A tensor of the host on `device`. CUDA has read it when the call returns, and nothing waits;
    elsewhere the copy is waited for."""
    with torch.inference_mode(False):  # so that it may serve outside that mode too
        return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


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
    """A copy of alphas_cumprod in the dtype to compute with: float64 where exact, else no less than
    float32, as the schedulers' own are. It stays when somebody writes into the scheduler's."""
    own = torch.promote_types(alpha_bar.dtype, torch.float32)
    return alpha_bar.detach().to("cpu", torch.float64 if exact else own, copy=True).numpy()


class TableRun(HeldRun):
    """A run whose every timestep has a row of one table.

    Attributes:
        timesteps: int64 [n], the host's copy of the scheduler's.
        alpha_bar: [T], the scheduler's alphas_cumprod, of the dtype to compute with.
        previous: int64 [T], where the step from each timestep leads (see rows).
    """

    def __init__(
        self, scheduler, timesteps: np.ndarray, previous: np.ndarray, before: TableRun | None
    ):
        super().__init__()
        self.hold(scheduler)
        self._own, self._config = scheduler.timesteps, scheduler.config
        self.timesteps = timesteps
        self.alpha_bar = on_host(scheduler.alphas_cumprod, scheduler.exact_coefficients)
        self.previous = previous
        final = getattr(scheduler, "final_alpha_cumprod", None)  # DDIM's
        self._final = None if final is None else float(final)
        if before is not None and self._makes_the_tables_of(before):
            self._tensors = before._tensors

    def _makes_the_tables_of(self, other: TableRun) -> bool:
        return (
            self._config is other._config
            and self._final == other._final
            and np.array_equal(self.previous, other.previous)
            and self.alpha_bar.dtype == other.alpha_bar.dtype
            and np.array_equal(self.alpha_bar, other.alpha_bar)
        )

    def read(self, timestep) -> int | None:
        """A timestep as an int, without waiting for a device; None for one that only it knows."""
        if not isinstance(timestep, Tensor):
            return timestep.__index__()
        if torch.compiler.is_compiling():
            return None
        place = known_place(timestep, self._own)
        if place is not None:
            return int(self.timesteps[place])
        return int(timestep) if timestep.device.type == "cpu" else None

    def check(self, t: int) -> None:
        """Raise IndexError for a timestep that the run has no step from."""
        if not 0 <= t < len(self.previous) or self.previous[t] == UNKNOWN:
            raise IndexError(f"timestep: wanted one of the scheduler's timesteps, got {t}")

    def table(self, options: tuple, device, dtype, weights: Callable[..., np.ndarray]) -> Tensor:
        """Coefficients [T, 7] on `device`: the row of a timestep is its own number."""
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return self.tensor(("table", *options), device, dtype, lambda: weights(self, *options))

    def row(self, t: int, options: tuple, device, dtype, weights) -> Tensor:
        """A timestep's [7] of the table."""
        key = (t, options, device, dtype)
        row = self._tensors.get(key)
        if row is None:
            row = self.table(options, device, dtype, weights)[t]
            if is_lasting(row):
                self._tensors[key] = row
        return row

    def steps(self, device) -> Tensor:
        """1..T on `device`: diffusers counts timesteps from 0, the noise contract from 1."""
        return self.tensor("steps", device, torch.int64, lambda: np.arange(len(self.previous)) + 1)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
