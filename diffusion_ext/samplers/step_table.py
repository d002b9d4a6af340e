"""StepTable: a sampler as one row of numbers for each call of its model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..checks import Device, as_device, kind, moved, numbered
from ..ops.backend import constant_to_compile
from ..ops.row_shape import RowShape
from ..ops.sampler_step import COLUMNS
from .schedules import is_lasting

# What a table is made of: each array's axes, and its rows beyond the table's n.
ARRAYS = {
    "timesteps": (1, 0),
    "weights": (2, 0),
    "times": (1, 0),
    "levels": (2, 1),
    "begins": (1, 0),
}


@dataclass(frozen=True, eq=False)
class StepTable:
    """A sampler, ready to run: one row of coefficients for each call of the model.

    `sample` runs it, and `sampler_step` takes one step by it. Its arrays are read-only, for what is
    made of them is kept: `tensors` has them as tensors, and torch.tensor(table.times) copies one.

    Attributes:
        timesteps: int64 [n], the timestep of each row, which also numbers the row's noise.
        weights: float64 [n, columns]: kx km | ax am a0 a1..aS az, then what the slots receive and
            a guidance scale, where the table has them (see `RowShape`).
        clip: x0 is clipped to [-clip, clip]; None for no clipping.
        train_timesteps: T of the schedule.
        times: float64 [n], what the model is given before each row; by default timesteps/T.
        levels: float64 [n+1, 2], signal and sigma of the sample before each row and after the
            last: x = signal·x0 + sigma·ε. None where they are not known.
        slots: S, how many tensors it remembers things in; by default 1 where a row looks back at
            the x0 of the row before, else 0.
        begins: bool [n], whether a step begins with the row: a step may call the model twice.
        rest: rest(step, shape) -> the table from a step on, begun with empty slots; None for a
            table that no sampler made.
        noisy: bool [n], whether a row makes anything of noise.
    """

    timesteps: np.ndarray
    weights: np.ndarray
    clip: float | None
    train_timesteps: int
    times: np.ndarray | None = None
    levels: np.ndarray | None = None
    slots: int | None = None
    begins: np.ndarray | None = None
    rest: Callable[[int, RowShape], StepTable] | None = field(default=None, repr=False)
    noisy: np.ndarray = field(init=False, repr=False)
    _digest: str = field(init=False, repr=False)
    _tensors: dict[tuple[Any, ...], Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check_arrays(self)
        if self.times is None:
            object.__setattr__(self, "times", self.timesteps / self.train_timesteps)
        if self.begins is None:
            object.__setattr__(self, "begins", np.ones(len(self.timesteps), dtype=bool))
        if self.slots is None:
            ah = COLUMNS.index("ah")
            looks_back = (self.weights[:, ah : ah + 1] != 0).any()
            object.__setattr__(self, "slots", int(looks_back))
        if self.shape is None:
            width = RowShape(max(self.slots, 1)).width
            raise ValueError(
                f"weights: wanted {width} columns for {self.slots} slots, or more where rows write "
                f"them, got {self.weights.shape[1]}"
            )
        columns = [self.shape.next.stop - 1]
        columns += [self.shape.write(i).stop - 1 for i in range(self.shape.writes)]
        object.__setattr__(self, "noisy", (self.weights[:, columns] != 0).any(axis=1))
        for name in (*ARRAYS, "noisy"):
            if getattr(self, name) is None:
                continue
            frozen = getattr(self, name).copy()
            frozen.setflags(write=False)
            object.__setattr__(self, name, frozen)
        content = hashlib.sha256(self.weights.tobytes() + self.timesteps.tobytes())
        object.__setattr__(self, "_digest", content.hexdigest())

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def shape(self) -> RowShape | None:
        """Where its rows have what."""
        return RowShape.of(self.weights.shape[1], max(self.slots, 1))

    @property
    def multistep(self) -> bool:
        """Whether a row looks back at what one before it remembered."""
        return self.slots > 0

    @property
    def guidance(self) -> np.ndarray | None:
        """float64 [n], the guidance scale of each row; None where a run has one for all."""
        return self.weights[:, -1] if self.shape.guided else None

    def new_slots(self, x: torch.Tensor) -> torch.Tensor | None:
        """Zeros [S, *x.shape] for what a run from x [B, *] remembers, each laid out as x; None for
        a table without slots."""
        if not self.slots:
            return None
        like = torch.empty_like(x)
        strides = (x.numel(), *like.stride())
        return x.new_empty_strided((self.slots, *x.shape), strides).zero_()

    def starting_at(self, row: int) -> StepTable:
        """This table for a run that starts at `row`, with empty slots. The rows before it stay.

        Raises: ValueError for a row inside a step, or a table that cannot start without its slots.
        """
        if row == 0 or not self.slots:
            return self
        unguided = replace(self.shape, guided=False)
        if self.rest is None or not self.begins[row]:
            before = 0 if self.rest is None else np.flatnonzero(self.begins[:row])[-1]
            raise ValueError(
                f"first_step: wanted a row that can begin a run, such as {before}, got {row}"
            )
        rest = self.rest(int(self.begins[:row].sum()), unguided)
        weights = rest.weights
        if self.guidance is not None:  # of rows that may be one more; the last scales are theirs
            scales = self.guidance[np.arange(len(rest)) + len(self) - len(rest)]
            weights = np.column_stack([weights, scales])
        parts = {"weights": np.concatenate([self.weights[:row], weights])}
        for name in ("timesteps", "times", "levels", "begins"):
            parts[name] = np.concatenate([getattr(self, name)[:row], getattr(rest, name)])
        return replace(self, **parts)

    @property
    def coefficients(self) -> np.ndarray:
        """float32 [n, columns], as the kernels read the weights, whatever the sample's dtype."""
        return self.weights.astype(np.float32)

    def tensors(
        self, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(coefficients [n, columns], timesteps int64 [n]) on `device`, copied there once.

        The coefficients are float32, or float64 where the samples' dtype is. They are the table's
        own: clone what you change. Raises: TypeError, ValueError for a device that is not here.
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return self._on(device, "weights", dtype), self._on(device, "timesteps", torch.int64)

    def steps_of(self, x: torch.Tensor) -> tuple[Any, ...]:
        """(coefficients, timesteps, rows, noisy) for steps of x: `tensors`, the number of each row
        as an int64 [] on x's device, and whether each makes anything of noise."""
        return self._steps_of(self._digest, x.device, x.dtype)

    @constant_to_compile  # as NoiseSchedule.constant, with its digest
    def _steps_of(self, digest: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
        key = (device, dtype)
        if key in self._tensors:
            return self._tensors[key]
        rows = self._on(device, "_rows", torch.int64)
        made = (*self.tensors(device, dtype), rows.unbind(), self.noisy.tolist())
        if is_lasting(rows):
            self._tensors[key] = made
        return made

    def run_tensors(
        self, device: Device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(times [n], levels [n+1, 2] or None) on `device`, copied there once.

        They are float32 at least: half precision cannot tell one timestep of a thousand from the
        next.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        levels = None if self.levels is None else self._on(device, "levels", dtype)
        return self._on(device, "times", dtype), levels

    @property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self))

    def __getstate__(self) -> dict:
        return {**vars(self), "_tensors": {}}  # a file, or a copy, is of no device

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.__post_init__()  # what an older version's state lacks

    def _on(self, device, name: str, dtype: torch.dtype) -> torch.Tensor:
        device = numbered(device)
        key = (device, name, dtype)
        if key in self._tensors:
            return self._tensors[key]
        array = torch.from_numpy(getattr(self, name).copy())
        tensor = moved(array, as_device(device), dtype)
        if is_lasting(tensor):
            self._tensors[key] = tensor
        return tensor


def _check_arrays(table: StepTable) -> None:
    for name, (axes, more) in ARRAYS.items():
        array = getattr(table, name)
        if array is None and name not in ("timesteps", "weights"):
            continue
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name}: wanted an array of numpy, got {kind(array)}")
        rows = len(table.timesteps) + more
        if array.ndim != axes or len(array) != rows:
            wanted = f"[{rows}]" if axes == 1 else f"[{rows}, columns]"
            raise ValueError(f"{name}: wanted shape {wanted}, got {list(array.shape)}")


def check_table(table) -> None:
    if not isinstance(table, StepTable):
        raise TypeError(
            "table: wanted a StepTable, such as dx.ddim(schedule, steps=20) returns, "
            f"got {kind(table)}"
        )
