"""What `sample` does at a step: hands the model its batch, applies a row of the table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_like
from .ops import backend, reference, sampler_step
from .samplers import COLUMNS, StepTable

AZ = COLUMNS.index("az")


class Stepper:
    """The sample x [B,*] and the table's rows; what can be checked and made once is.

    Args:
        x: the initial sample. guidance: 1 for none; else the batch is doubled.
        seeds: int64 [B]. noise: noise(step_index, timestep) -> [B,*] in place of theirs, or None.
    """

    def __init__(self, table: StepTable, x: Tensor, seeds: Tensor, noise, guidance: float):
        self.table, self.seeds, self.noise, self.guidance = table, seeds, noise, guidance
        self.coefficients, self.timesteps = table.tensors(x.device, x.dtype)
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.halves = 2 if guidance != 1 else 1
        # Half precision cannot tell one timestep of a thousand from the next.
        self.time_dtype = torch.promote_types(x.dtype, torch.float32)

    def _no_history(self) -> Tensor | None:
        """Of a multistep table, the x0 of the step before, which the first step gives no weight."""
        return torch.zeros_like(self.x) if self.table.multistep else None

    def _arguments(self, i: int) -> tuple:
        noise = seeds = None
        if self.table.weights[i, AZ] != 0:
            noise, seeds = self._noise(i)
        row = (self.coefficients, self.timesteps, self.rows[i])
        return (*row, noise, seeds, self.history, self.table.clip, self.guidance)

    def _noise(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        if self.noise is None:
            return None, self.seeds
        noise = self.noise(i, int(self.table.timesteps[i]))
        check_like("noise", noise, "x", self.x)
        return noise, None


class InPlaceStepper(Stepper):
    """Updates one buffer: with the kernels, a step allocates nothing."""

    def __init__(self, table, x, seeds, noise, guidance, memory_format: torch.memory_format):
        super().__init__(table, x, seeds, noise, guidance)
        shape = (self.halves * len(x), *x.shape[1:])
        self._inputs = torch.empty(
            shape, dtype=x.dtype, device=x.device, memory_format=memory_format
        )
        self._times = torch.empty(shape[0], dtype=self.time_dtype, device=x.device)
        # Under guidance the first half of the inputs copies the sample.
        self.x = self._inputs[shape[0] - len(x) :].copy_(x)
        self.history = self._no_history()
        self._native = backend.serves(self.x)

    def inputs(self, i: int) -> tuple[Tensor, Tensor]:
        """The model's batch [B or 2B,*] and its times [B or 2B]."""
        if self.halves == 2:
            self._inputs[: len(self.x)].copy_(self.x)
        return self._inputs, self._times.fill_(float(self.table.times[i]))

    def step(self, i: int, output: Tensor) -> None:
        if self._native:
            backend.kernels().sampler_step_(self.x, output, *self._arguments(i))
            return
        x, x0 = reference.sampler_step(self.x, output, *self._arguments(i))
        self.x.copy_(x)
        if self.history is not None:
            self.history.copy_(x0)

    def result(self) -> Tensor:
        return self.x.clone() if self.halves == 2 else self.x


class DifferentiableStepper(Stepper):
    """A new sample at every step, for autograd to look back through."""

    def __init__(self, table, x, seeds, noise, guidance):
        super().__init__(table, x, seeds, noise, guidance)
        self.x = x
        self.history = self._no_history()

    def inputs(self, i: int) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([self.x] * self.halves)
        time = float(self.table.times[i])
        return inputs, inputs.new_full((len(inputs),), time, dtype=self.time_dtype)

    def step(self, i: int, output: Tensor) -> None:
        self.x, x0 = sampler_step(self.x, output, *self._arguments(i), return_x0=True)
        if self.history is not None:
            self.history = x0

    def result(self) -> Tensor:
        return self.x


class Known:
    """An image that sampling starts from, and what of it is kept.

    Args:
        image: [B,C,H,W]. noise: [B,C,H,W], its noise at every level. levels: float64 [n+1, 2].
        mask: [B or 1, C or 1, H, W] in [0, 1], 1 where the image is drawn anew, 0 where it stays.
    """

    def __init__(self, image: Tensor, noise: Tensor, mask: Tensor | None, levels):
        self.image, self.noise, self.mask, self.levels = image, noise, mask, levels

    def at(self, level: int) -> Tensor:
        """The image as noised as the sample before step `level` (Ho et al. 2020, eq. 4)."""
        signal, sigma = self.levels[level]
        return signal * self.image + sigma * self.noise

    def keep(self, level: int, x: Tensor) -> Tensor:
        """x where the mask is 1, else the image at that level (Lugmayr et al. 2022, eq. 8)."""
        return torch.lerp(self.at(level), x, self.mask)


def draws(generator: torch.Generator, shape, dtype, device) -> Callable[..., Tensor]:
    """A noise source that takes torch.randn's next numbers from the generator."""

    def draw(*_) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        return noise.to(device)

    return draw
