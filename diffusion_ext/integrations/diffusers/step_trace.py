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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ops.row_shape import MOST_SLOTS, MOST_WRITES, RowShape
from ...ops.sampler_step import step_of_row

__all__ = ["Source", "StepTrace", "Untraceable", "trace_step"]

X, M, X0, Z, KEPT = range(5)  # the inputs of a step; from KEPT on, the tensors of its state


class Untraceable(Exception):
    """A row cannot say this step."""


SAMPLE, OUTPUT, NOISE, NEXT = range(4)  # the first elements; see Source


class Source(NamedTuple):
    """Where a result is found: an element of (sample, model output, noise, x', x0 where it is
    returned, the row's writes ..., the state's tensors ...); the dtype that diffusers gives it."""

    element: int
    dtype: torch.dtype | None = None

    def of(self, elements: tuple) -> Tensor:
        tensor = elements[self.element]
        return tensor if self.dtype is None else tensor.to(self.dtype)


@dataclass
class StepTrace:
    """What a step does, whatever the values of its tensors.

    Attributes:
        row: [columns], for `step_of_row` with the tensors `slots` of the state.
        clip: x0's limit, or None.
        threshold: None, or the row of a step before, whose x0 goes through diffusers'
            _threshold_sample and is the last slot of this one.
        returns_x0: x0 is among the results.
        noise: the dtype of the noise that the step draws, or None.
        between: (σ, σ') that the step asks its noise_sampler for, or None.
        output: what the step returns: its class, or tuple, and the Source of each element.
        state: attribute -> what it is after the step: a value, a Source, or a list of them.
        scaled: the next scale_model_input of x', where that was asked for.
        single: sample, model output and state are of one dtype.
        step: the step of its noise, as the kernel counts.
    """

    row: Tensor
    slots: tuple[int, ...]
    clip: float | None
    threshold: Tensor | None
    returns_x0: bool
    noise: torch.dtype | None
    between: tuple | None
    output: tuple[type, tuple[str, ...], tuple[Source, ...]]
    state: dict
    scaled: Source | None
    single: bool
    step: int = 0

    def __post_init__(self):
        def is_source(value) -> bool:
            return isinstance(value, Source)

        self.plain = self.single and self.threshold is None
        every = [v for value in self.state.values() for v in leaves(value)]
        self.keeps_noise = any(is_source(v) and v.element == NOISE for v in every)
        self._lists = [(n, v) for n, v in self.state.items() if isinstance(v, list)]
        self._tensors = [(n, v.element) for n, v in self.state.items() if is_source(v)]
        named = {n for n, _ in (*self._lists, *self._tensors)}
        self._values = {n: v for n, v in self.state.items() if n not in named}
        self._rows = {self.row.device: self.row}

    def run(self, x, model_output, noise, seeds, slots: list) -> list[Tensor]:
        """x', x0 where it is returned and not thresholded, and what the row writes."""
        try:
            row = self._rows[x.device]
        except KeyError:  # put there once, without waiting for the device
            row = self._rows[x.device] = self.row.to(x.device, non_blocking=True)
        clip, x0 = self.clip, self.returns_x0 and self.threshold is None
        return step_of_row(x, model_output, row, self.step, noise, seeds, slots, clip, x0)

    def keep(self, elements: tuple, attributes: dict) -> None:
        """Put the state after the step into a scheduler's attributes."""
        attributes.update(self._values)
        for name, element in self._tensors:
            attributes[name] = elements[element]
        for name, values in self._lists:
            attributes[name] = [elements[v.element] if isinstance(v, Source) else v for v in values]

    def returned(self, elements: tuple):
        """The step's result."""
        kind, names, sources = self.output
        results = [source.of(elements) for source in sources]
        return tuple(results) if kind is tuple else kind(**dict(zip(names, results, strict=True)))


def trace_step(
    scheduler, state: dict, timestep, options: dict, dtypes: Sequence[torch.dtype], scaled: bool
) -> StepTrace:
    """Trace scheduler.step, diffusers' own, on a copy of `scheduler`, which stays as it is.

    Args:
        scheduler: of diffusers' class, its tensors on the CPU.
        state: attribute -> value, of those that its steps change; tensors [B, *] count as inputs.
        timestep, options: of the step. dtypes: of sample, model_output and the state's tensors.
        scaled: trace scale_model_input of the result too.
    Raises: Untraceable, and what diffusers raises.
    """
    count = KEPT + sum(is_kept(leaf) for value in state.values() for leaf in leaves(value))
    run = _Run(scheduler, state, timestep, options, [torch.float64] * count, scaled)
    if set(dtypes) != {torch.float32}:  # diffusers may round or widen: see to what
        kept = dtypes[2:]
        typed = _Run(scheduler, state, timestep, options, [*dtypes[:2], *dtypes[:2], *kept], scaled)
        run.noise, run.dtypes = typed.noise, [form.dtype for form in typed.forms]
    elif run.noise is not None:
        run.noise = torch.float32
    run.row_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    run.single = {*dtypes, run.noise or dtypes[0]} == {dtypes[0]}
    return run.compiled()


def leaves(value) -> tuple:
    """The elements of a list, or the one value."""
    return tuple(value) if isinstance(value, list) else (value,)


def is_kept(leaf) -> bool:
    """Whether an element of the state is a tensor [B, *]; those of no dimension are numbers."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0


class _Run(TorchFunctionMode):
    """One run of diffusers' step on unit vectors [K, 1, 1, 1]. As a mode it meets the calls that
    are not linear, and those that would round."""

    def __init__(self, scheduler, state, timestep, options, dtypes, scaled):
        super().__init__()
        count = len(dtypes)
        unit = torch.eye(count, dtype=torch.float64).reshape(count, count, 1, 1, 1)
        self.units = [u.to(dtype) for u, dtype in zip(unit, dtypes, strict=True)]
        self.inputs = [u.clone() for u in self.units]  # which a step might write into
        self.exact = set(dtypes) == {torch.float64}
        self.clip = self.limits = self.noise = self.between = None
        self.thresholds, self.dtypes = False, []
        kept = iter(self.inputs[KEPT:])
        trial = copy.copy(scheduler)
        for name, value in state.items():
            new = [next(kept) if is_kept(leaf) else leaf for leaf in leaves(value)]
            setattr(trial, name, new if isinstance(value, list) else new[0])
        trial._threshold_sample = self._thresholded
        if "noise_sampler" in vars(trial):
            trial.noise_sampler = self._brownian
        if options.get("variance_noise") is not None:
            options = {**options, "variance_noise": self._drawn(None)}
        before = dict(vars(trial))
        with self, torch.no_grad():
            self.result = trial.step(self.inputs[M], timestep, self.inputs[X], **options)
            self.state = {name: vars(trial).get(name) for name in state}
            self.scaled = self._scaled(trial) if scaled else None
        changed = {n for n, v in vars(trial).items() if n not in state and before.get(n) is not v}
        if changed:
            raise Untraceable(f"a step changes {changed}")
        self.forms = [self._first(), *self._others()]

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
        self.limits = float(most)
        return self._predicted(form)

    def _thresholded(self, form) -> Tensor:
        self.thresholds = True
        return self._predicted(form)

    def _predicted(self, form) -> Tensor:
        if self.clip is not None or form[X0:].any():
            raise Untraceable("x0 is more than the sample and the model output")
        self.clip = form
        return self.inputs[X0].to(form.dtype)

    def _scaled(self, trial) -> Tensor | None:
        """scale_model_input of x' at the step that follows; None after the last."""
        index = trial.step_index
        if index >= len(trial.timesteps):
            return None
        return trial.scale_model_input(self._first(), trial.timesteps[index])

    def _first(self) -> Tensor:
        return self.result[0]

    def _others(self) -> list[Tensor]:
        """The other results, what is kept and what is scaled, in an order that all runs share."""
        result = self.result if isinstance(self.result, tuple) else tuple(self.result.values())
        kept = [leaf for value in self.state.values() for leaf in leaves(value) if is_kept(leaf)]
        return [*result[1:], *kept, *([] if self.scaled is None else [self.scaled])]

    # --- the row ----------------------------------------------------------------------------------

    def compiled(self) -> StepTrace:
        following, *others = self.forms
        wanted = [form for form in others if self._input(form) is None]
        if self.clip is None:  # the kernel's x0 is any combination of x and m that is wanted
            x0 = next((form for form in wanted if not form[X0:].any()), None)
            self.clip = x0
        else:
            x0 = self.units[X0] if any(_same(f, self.units[X0]) for f in self.forms) else None
        written: list[Tensor] = []
        for form in wanted:
            if not any(_same(form, other) for other in (following, x0, *written)):
                written.append(form)
        made = torch.stack([following, *written]).flatten(1).numpy()
        slots = tuple(j for j in range(len(self.units) - KEPT) if made[:, KEPT + j].any())
        self._results = [following, *([] if x0 is None else [x0]), *written]
        sources = iter([self._source(i) for i in range(len(self.forms))])
        row, threshold = (
            None if numbers is None else torch.tensor(numbers, dtype=self.row_dtype)
            for numbers in (self._row(made, slots), self._threshold())
        )
        return StepTrace(
            row, slots, self.limits, threshold, x0 is not None,
            self.noise, self.between, self._output(sources), self._state(sources),
            next(sources, None), self.single,
        )  # fmt: skip

    def _row(self, made: np.ndarray, slots: tuple[int, ...]) -> np.ndarray:
        """Of x' and the writes, made [1 + writes, K]."""
        threshold = self._threshold() is not None
        shape = RowShape(max(len(slots) + threshold, 1), len(made) - 1)
        if shape.slots > MOST_SLOTS or shape.writes > MOST_WRITES:
            raise Untraceable(f"a step wants {shape.slots} slots and {shape.writes} writes")
        inputs = [X, M, *([] if threshold else [X0]), *(KEPT + j for j in slots)]
        inputs += [X0] if threshold else []
        columns = [0, 1, *([] if threshold else [2]), *range(3, 3 + len(slots) + threshold)]
        row = np.zeros(shape.width)
        row[:2] = 0 if self.clip is None else self.clip[:X0].flatten()
        for i, weights in enumerate(made):
            combination = row[shape.next if i == 0 else shape.write(i - 1)]  # a view
            combination[columns], combination[-1] = weights[inputs], weights[Z]
        return row

    def _threshold(self) -> np.ndarray | None:
        if self.clip is None or self.limits is not None or not self.thresholds:
            return None
        return np.array([*self.clip[:X0].flatten(), 0, 0, 0, 0, 0])

    def _source(self, i: int) -> Source:
        form, dtype = self.forms[i], self.dtypes[i] if self.dtypes else None
        if i > 0 and (place := self._input(form)) is not None:
            kept = NEXT + len(self._results) + place - KEPT
            return Source({X: SAMPLE, M: OUTPUT, X0: NEXT + 1, Z: NOISE}.get(place, kept), dtype)
        made = next(n for n, result in enumerate(self._results) if _same(form, result))
        return Source(NEXT + made, dtype)

    def _input(self, form: Tensor) -> int | None:
        """Which input a form is, the very tensor; a copy of one has to be made."""
        for i, (given, unit) in enumerate(zip(self.inputs, self.units, strict=True)):
            if form is given and torch.equal(given, unit):
                return i
        return None

    def _output(self, sources) -> tuple:
        if isinstance(self.result, tuple):
            return tuple, (), tuple(next(sources) for _ in self.result)
        return type(self.result), tuple(self.result), tuple(next(sources) for _ in self.result)

    def _state(self, sources) -> dict:
        state = {}
        for name, value in self.state.items():
            # In the kernel's dtype, whatever diffusers widens its state to.
            new = [Source(next(sources).element) if is_kept(v) else v for v in leaves(value)]
            state[name] = new if isinstance(value, list) else new[0]
        return state


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and torch.equal(a.double(), b.double())
