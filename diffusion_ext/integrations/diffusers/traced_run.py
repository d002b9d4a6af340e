"""What a traced scheduler's run is, as the host knows it, and the traces of its steps."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .fused_scheduler import FusedScheduler
from .runs import HeldRun, known_place, on_host, on_the_host
from .step_trace import StepTrace

__all__ = ["TracedRun"]

MOST_TRACES = 4096  # of a run: options may be other numbers at every step


class TracedRun(HeldRun):
    """A run whose steps are traced.

    Attributes:
        host: a scheduler of diffusers' class with the same attributes, its tensors on the CPU;
            their floats are float64 where coefficients are to be exact.
        traces: key -> StepTrace, of every kind of step that was taken.
        indices: timestep -> the place of the first step from it, as diffusers finds it.
    """

    def __init__(self, scheduler: FusedScheduler, before: TracedRun | None = None):
        super().__init__()
        self.exact = scheduler.exact_coefficients
        self._copies = {} if before is None or before.exact != self.exact else before._copies
        self.host = self._on_host(scheduler)
        self.traces: dict[tuple, StepTrace | None] = {}
        self.indices: dict[float, int] = {}
        if before is not None and before.exact == self.exact and _equal(before.host, self.host):
            self.traces, self.indices = before.traces, before.indices
            self._tensors = before._tensors
        self._numbers: dict[int, tuple[Tensor, int, float]] = {}
        # PNDM's are None until they are set.
        self.timesteps = [] if self.host.timesteps is None else self.host.timesteps.tolist()
        self.hold(scheduler)

    def _on_host(self, scheduler: FusedScheduler):
        host = object.__new__(scheduler.theirs)
        left_out = {*scheduler.state, *scheduler.own}
        for name, value in vars(scheduler).items():
            if name not in left_out:
                is_tensor = isinstance(value, Tensor)
                vars(host)[name] = self._copy(name, value) if is_tensor else value
        return host

    def _copy(self, name: str, value: Tensor) -> Tensor:
        """On the CPU; that of the run before where it is of the same tensor."""
        version = None if value.is_inference() else value._version
        original, known_version, copied = self._copies.get(name, (None, None, None))
        if original is value and version is not None and version == known_version:
            return copied
        exact = self.exact and value.is_floating_point()
        copied = value.detach().to("cpu", torch.float64 if exact else value.dtype, copy=True)
        self._copies = {**self._copies, name: (value, version, copied)}
        return copied

    def hold(self, scheduler) -> None:
        super().hold(scheduler)
        self._own = scheduler.timesteps

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return on_host(self.host.alphas_cumprod, self.exact)

    def value(self, timestep: Tensor) -> float | int | None:
        """A timestep, without waiting for a device; None for one that only it knows."""
        place = known_place(timestep, self._own)
        if place is not None:
            return self.timesteps[place]
        return timestep.item() if timestep.is_cpu and timestep.dim() == 0 else None

    def number(self, scalar: Tensor) -> float:
        """What a tensor [] of the state holds, on the host; read once, since steps put it there."""
        version = None if scalar.is_inference() else scalar._version
        known = self._numbers.get(id(scalar))
        if known is None or known[0] is not scalar or known[1] != version or version is None:
            if len(self._numbers) >= MOST_TRACES:
                self._numbers.clear()
            with on_the_host():
                known = scalar, version, scalar.item()
            self._numbers[id(scalar)] = known
        return known[2]

    def moment(self, timestep) -> tuple | None:
        """A timestep as a key, with its kind."""
        if not isinstance(timestep, Tensor):
            return type(timestep), timestep
        value = self.value(timestep)
        return None if value is None else (timestep.dtype, value)

    def keep(self, key: tuple, trace: StepTrace | None) -> StepTrace | None:
        """The trace; None is kept where diffusers' own step has to serve."""
        if len(self.traces) >= MOST_TRACES:
            self.traces.clear()
        self.traces[key] = trace
        return trace


def _equal(a, b) -> bool:
    """Whether two hosts have the same numbers."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    return all(_equal_values(value, vars(b)[name]) for name, value in vars(a).items())


def _equal_values(a, b) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN in both
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)
