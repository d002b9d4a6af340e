"""StepTrace: what one step of a diffusers scheduler does, as a row and where its results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.sampler_step import step_of_row
from .runs import put_on

__all__ = ["Source", "StepTrace", "is_kept", "leaves"]

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
        notes: attribute -> the places of its elements in the list before; -1: the timestep.
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
    notes: dict[str, list[int]]
    single: bool
    step: int = 0

    def __post_init__(self):
        def is_source(value) -> bool:
            return isinstance(value, Source)

        self.plain = self.single and self.threshold is None
        every = [v for value in self.state.values() for v in leaves(value)]
        self.keeps_noise = any(is_source(v) and v.element == NOISE for v in every)
        self._lists = [(n, v) for n, v in self.state.items() if isinstance(v, list)]
        self._tensors = [(n, v) for n, v in self.state.items() if is_source(v)]
        named = {n for n, _ in (*self._lists, *self._tensors)}
        self._values = {n: v for n, v in self.state.items() if n not in named}
        self._rows = {self.row.device: self.row}

    def run(self, x, model_output, noise, seeds, slots: list) -> list[Tensor]:
        """x', x0 where it is returned and not thresholded, and what the row writes."""
        try:
            row = self._rows[x.device]
        except KeyError:
            row = self._rows[x.device] = put_on(self.row, x.device)
        clip, x0 = self.clip, self.returns_x0 and self.threshold is None
        return step_of_row(x, model_output, row, self.step, noise, seeds, slots, clip, x0)

    def keep(self, elements: tuple, timestep, attributes: dict) -> None:
        """Put the state after the step into a scheduler's attributes."""
        attributes.update(self._values)
        for name, source in self._tensors:
            attributes[name] = source.of(elements)
        for name, values in self._lists:
            attributes[name] = [v.of(elements) if isinstance(v, Source) else v for v in values]
        for name, places in self.notes.items():
            before = attributes[name]
            attributes[name] = [timestep if i < 0 else before[i] for i in places]

    def returned(self, elements: tuple):
        """The step's result."""
        kind, names, sources = self.output
        results = [source.of(elements) for source in sources]
        return tuple(results) if kind is tuple else kind(**dict(zip(names, results, strict=True)))


def leaves(value) -> tuple:
    """The elements of a list, or the one value."""
    return tuple(value) if isinstance(value, list) else (value,)


def is_kept(leaf) -> bool:
    """Whether an element of the state is a tensor [B, *]; those of no dimension are numbers."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0
