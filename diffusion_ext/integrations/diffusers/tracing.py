"""The weights of a diffusers scheduler's step, read off diffusers' own code.

A step of theirs is linear in the sample x, the model output m, the noise z and the tensors that it
keeps from the steps before (its state), once x0 is clipped. So one run of it on unit vectors says
all: each input is a tensor of as many numbers as there are inputs, how much of each is in it, and
what comes out are the weights of a row of `sampler_step`. They are diffusers' own, in the precision
in which diffusers computes them; the products and sums of weights are in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ops.row_shape import MOST_SLOTS, MOST_WRITES, RowShape
from .step_trace import NEXT, NOISE, OUTPUT, SAMPLE, Source, StepTrace, is_kept, leaves

__all__ = ["StepCall", "Untraceable", "trace_step"]

X, M, X0, Z, KEPT = range(5)  # the inputs of a step; from KEPT on, the tensors of its state


class Untraceable(Exception):
    """A row cannot say this step."""


@dataclass(frozen=True)
class StepCall:
    """A step that is to be traced.

    Attributes:
        state: attribute -> value, of those that a step changes; tensors [B, *] count as inputs.
        notes: attribute -> length, of lists that a step changes and no step reads.
        timestep: on the host. options: the step's other arguments.
        dtypes: of the sample, the model output and the state's tensors.
    """

    state: dict
    notes: dict[str, int]
    timestep: Tensor | int | float
    options: dict
    dtypes: Sequence[torch.dtype]


def trace_step(scheduler, call: StepCall) -> StepTrace:
    """Trace scheduler.step, diffusers' own, on a copy of `scheduler`, which stays as it is.

    Args: scheduler: of diffusers' class, its tensors on the CPU.
    Raises: Untraceable, and what diffusers raises.
    """
    if any(isinstance(value, SchedulerMixin) for value in vars(scheduler).values()):
        raise Untraceable("another scheduler in it, with a state of its own")
    dtypes = (*call.dtypes[:2], *call.dtypes)  # x0 and the noise have those of x and m
    run = _UnitRun(scheduler, call, [torch.float64] * len(dtypes), exact=True)
    noise, of_forms = None if run.noise is None else torch.float32, [None] * len(run.forms)
    if set(dtypes) != {torch.float32}:  # diffusers may round or widen: see to what
        typed = _UnitRun(scheduler, call, dtypes)
        noise, of_forms = typed.noise, [form.dtype for form in typed.forms]
    return _compiled(run, call.dtypes, noise, of_forms)


class _UnitRun(TorchFunctionMode):
    """One run of diffusers' step on unit vectors [K, 1, 1, 1]. As a mode it meets the calls that
    are not linear.

    Attributes:
        forms: all tensors that come out, in an order that runs of one call share: x', the other
            results, the state's.
        x0: the combination of x and m that is clipped to `limit`, or thresholded; or None.
        noise: the dtype of the noise that is drawn, or None; between: (σ, σ') it is asked for.
    """

    def __init__(self, scheduler, call: StepCall, dtypes, exact: bool = False):
        super().__init__()
        count = len(dtypes)
        unit = torch.eye(count, dtype=torch.float64).reshape(count, count, 1, 1, 1)
        self.units = [u.to(dtype) for u, dtype in zip(unit, dtypes, strict=True)]
        self.inputs = [u.clone() for u in self.units]  # which a step might write into
        self.exact = exact  # stay in float64, whatever diffusers would round to
        self.x0 = self.limit = self.noise = self.between = None
        trial, options = self._prepared(scheduler, call)
        before = dict(vars(trial))
        with self, torch.no_grad():
            self.result = trial.step(self.inputs[M], call.timestep, self.inputs[X], **options)
            self.state = {name: getattr(trial, name) for name in call.state}
        self.notes = {name: _places(getattr(trial, name), self._noted[name]) for name in call.notes}
        known = {*call.state, *call.notes}
        changed = {n for n, v in vars(trial).items() if n not in known and before.get(n) is not v}
        if changed:
            raise Untraceable(f"a step changes {changed}")
        results = self.result if isinstance(self.result, tuple) else tuple(self.result.values())
        kept = [leaf for value in self.state.values() for leaf in leaves(value) if is_kept(leaf)]
        self.forms = [*results, *kept]

    def _prepared(self, scheduler, call: StepCall):
        """A copy of the scheduler whose state is unit vectors, and the options of its step."""
        trial, kept = copy.copy(scheduler), iter(self.inputs[KEPT:])
        for name, value in call.state.items():
            new = [next(kept) if is_kept(leaf) else leaf for leaf in leaves(value)]
            setattr(trial, name, new if isinstance(value, list) else new[0])
        self._noted = {name: [object() for _ in range(n)] for name, n in call.notes.items()}
        for name, marks in self._noted.items():
            setattr(trial, name, list(marks))
        trial._threshold_sample = self._predicted
        if "noise_sampler" in vars(trial):
            trial.noise_sampler = self._brownian
        if call.options.get("variance_noise") is None:
            return trial, call.options
        return trial, {**call.options, "variance_noise": self._drawn(None)}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.randn:
            return self._drawn(kwargs.get("dtype"))
        if args and isinstance(args[0], Tensor) and args[0].dim() == 4:
            if func is Tensor.clamp:
                return self._clipped(*args, **kwargs)
            if self.exact and func in (Tensor.to, Tensor.float):
                return args[0]
        return func(*args, **kwargs)

    def _drawn(self, dtype) -> Tensor:
        if self.noise is not None:
            raise Untraceable("a step draws noise twice")
        self.noise = dtype or self.units[Z].dtype
        return self.inputs[Z] if self.exact else self.inputs[Z].to(self.noise)

    def _brownian(self, sigma, sigma_next) -> Tensor:
        self.between = sigma, sigma_next
        return self._drawn(None)

    def _clipped(self, form, least, most) -> Tensor:
        if not 0 < most == -least < np.inf:
            raise Untraceable(f"x0 is clipped to [{least}, {most}]")
        self.limit = float(most)
        return self._predicted(form)

    def _predicted(self, form) -> Tensor:
        if self.x0 is not None or form.shape != self.units[X].shape or form[X0:].any():
            raise Untraceable("x0 is more than the sample and the model output")
        self.x0 = form
        return self.inputs[X0].to(form.dtype)

    def input(self, form: Tensor) -> int | None:
        """Which input a form is, the very tensor; of one that is as large, a copy is made."""
        for i, (given, unit) in enumerate(zip(self.inputs, self.units, strict=True)):
            if form is given and torch.equal(given, unit):
                return i
        return None


# --- the row --------------------------------------------------------------------------------------


def _compiled(run: _UnitRun, dtypes, noise, of_forms) -> StepTrace:
    if any(form.shape != run.units[X].shape for form in run.forms):
        raise Untraceable("a result is not of the sample's shape")
    if not all(form.isfinite().all() for form in run.forms):
        raise Untraceable("a weight is infinite, or none")  # times 0 it would not be 0
    thresholds = run.x0 is not None and run.limit is None
    following, predicted, x0, *written = _results(run)
    made = torch.stack([following, *written]).flatten(1).numpy()
    slots = tuple(j for j in range(len(run.units) - KEPT) if made[:, KEPT + j].any())
    results = [form for form in (following, x0, *written) if form is not None]
    sources = iter([_source(run, i, results, dtype) for i, dtype in enumerate(of_forms)])
    kind = tuple if isinstance(run.result, tuple) else type(run.result)
    names = () if kind is tuple else tuple(run.result)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    weights = np.zeros(2) if predicted is None else predicted[:X0].flatten().numpy()
    return StepTrace(
        row=torch.tensor(_row(weights, made, slots, thresholds), dtype=wide),
        slots=slots,
        clip=run.limit,
        threshold=torch.tensor([*weights, 0, 0, 0, 0, 0], dtype=wide) if thresholds else None,
        returns_x0=x0 is not None,
        noise=noise,
        between=run.between,
        output=(kind, names, tuple(next(sources) for _ in run.result)),
        state={name: _state_after(value, sources) for name, value in run.state.items()},
        notes=run.notes,
        single=len({*dtypes, noise or dtypes[0]}) == 1,
    )


def _results(run: _UnitRun) -> list[Tensor | None]:
    """x', the kernel's x0 as a combination of x and m, the x0 that it returns or None, and what
    else it has to write."""
    following, *others = run.forms
    wanted = [form for form in others if run.input(form) is None]
    predicted, x0 = run.x0, run.units[X0]
    if predicted is None:  # then x0 may be any combination of x and m that is wanted
        predicted = x0 = next((form for form in wanted if not form[X0:].any()), None)
    elif not any(_same(form, x0) for form in run.forms):
        x0 = None
    written: list[Tensor] = []
    for form in wanted:
        if not any(_same(form, other) for other in (following, x0, *written)):
            written.append(form)
    return [following, predicted, x0, *written]


def _row(weights, made: np.ndarray, slots: tuple[int, ...], thresholds: bool) -> np.ndarray:
    """Of x0's weights [2], x' and the writes, made [1 + writes, K]."""
    shape = RowShape(max(len(slots) + thresholds, 1), len(made) - 1)
    if shape.slots > MOST_SLOTS or shape.writes > MOST_WRITES:
        raise Untraceable(f"a step wants {shape.slots} slots and {shape.writes} writes")
    inputs, columns = [X, M, X0, *(KEPT + j for j in slots)], list(range(3 + len(slots)))
    if thresholds:  # x0 is the last slot
        columns[2] = 3 + len(slots)
    row = np.zeros(shape.width)
    row[:2] = weights
    for i, combination in enumerate(made):
        place = row[shape.next if i == 0 else shape.write(i - 1)]  # a view
        place[columns], place[-1] = combination[inputs], combination[Z]
    return row


def _source(run: _UnitRun, i: int, results: list[Tensor], dtype) -> Source:
    """Where form i is found: x' is a tensor of its own, whatever it equals."""
    form = run.forms[i]
    if i > 0 and (place := run.input(form)) is not None:
        kept = NEXT + len(results) + place - KEPT
        return Source({X: SAMPLE, M: OUTPUT, X0: NEXT + 1, Z: NOISE}.get(place, kept), dtype)
    return Source(NEXT + next(n for n, made in enumerate(results) if _same(form, made)), dtype)


def _state_after(value, sources):
    new = [next(sources) if is_kept(leaf) else leaf for leaf in leaves(value)]
    return new if isinstance(value, list) else new[0]


def _places(now: list, before: list) -> list[int]:
    """Where each element was in the list before; -1 for a new one."""
    return [next((i for i, old in enumerate(before) if old is value), -1) for value in now]


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a.double(), b.double())
