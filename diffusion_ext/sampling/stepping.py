"""The steps of a run: the network, a row of the table, and what is kept of an image.

A stepper has the sample `x` [B,*], `advance(i)`, which does step i, and `result()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_like
from ..ops import backend, reference
from ..ops.sampler_step import COLUMNS, sampler_step
from ..samplers import StepTable
from .networks import CalledNetwork, PreparedNetwork

AZ = COLUMNS.index("az")


class NoiseSource:
    """The noise of each step.

    Args:
        seeds: int64 [B]. noise: noise(step_index, timestep) -> [B,*] in place of theirs, or None.
    """

    def __init__(self, table: StepTable, seeds: Tensor, noise: Callable | None):
        self._wanted = (table.weights[:, AZ] != 0).tolist()
        self.noise, self.seeds = noise, seeds if any(self._wanted) else None
        self._timesteps = table.timesteps.tolist()

    def at(self, i: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(noise, seeds) of step i, as sampler_step takes them; none where they have no weight."""
        if not self._wanted[i]:
            return None, None
        if self.noise is None:
            return None, self.seeds
        noise = self.noise(i, self._timesteps[i])
        check_like("noise", noise, "x", x)
        return noise, None


class Known:
    """An image that sampling starts from, and what of it is kept.

    Args:
        image: [B,C,H,W]. noise: [B,C,H,W], its noise at every level.
        levels: floats [n+1, 2], signal and sigma before each step and after the last.
        mask: [B or 1, C or 1, H, W] in [0, 1], 1 where the image is drawn anew, 0 where it stays.
    """

    def __init__(self, image: Tensor, noise: Tensor, levels: Tensor, mask: Tensor | None):
        self.image, self.noise, self.levels, self.mask = image, noise, levels, mask

    def before(self, i: int) -> Tensor:
        """The image as noised as the sample before step i."""
        return noised(self.image, self.noise, self.levels[i : i + 1])

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """For `keep`: image, noise, the levels after each step and the mask; None without one."""
        if self.mask is None:
            return None
        return self.image, self.noise, self.levels[1:], self.mask


def noised(image: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """signal·image + sigma·noise (Ho et al. 2020, eq. 4). level: [1, 2]."""
    return (level[:, 0] * image + level[:, 1] * noise).to(image.dtype)


def keep(kept: tuple[Tensor, Tensor, Tensor, Tensor], row: Tensor, x: Tensor) -> Tensor:
    """x where the mask is 1, else the image after that step (Lugmayr et al. 2022, eq. 8)."""
    image, noise, levels, mask = kept
    return torch.lerp(noised(image, noise, levels.index_select(0, row)), x, mask)


class InPlaceStepper:
    """Updates one buffer: with the kernels, a step allocates nothing of its own.

    Args:
        x: the initial sample. known: an image to keep, or None.
        guidance: 1 for none; else the network's batch is doubled, the context's first half the null
            one.
        memory_format: of the network's inputs.

    `tensors` is all that a step reads and writes, but for the model's own.
    """

    def __init__(
        self,
        network: CalledNetwork | PreparedNetwork,
        table: StepTable,
        x: Tensor,
        noise: NoiseSource,
        guidance: float,
        memory_format: torch.memory_format,
        known: Known | None = None,
        first_step: int = 0,
    ):
        self.network, self.noise, self.guidance, self.clip = network, noise, guidance, table.clip
        batch = (1 if guidance == 1 else 2) * len(x)
        inputs = torch.empty(
            (batch, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=memory_format
        )
        inputs[batch - len(x) :].copy_(x)
        coefficients, timesteps = table.tensors(x.device, x.dtype)
        self.use(
            {
                "inputs": inputs,
                "row": torch.full((), first_step, device=x.device),
                "coefficients": coefficients,
                "timesteps": timesteps,
                "steps": network.steps,
                "context": network.context,
                "seeds": noise.seeds,
                # The x0 of the step before, to which the first step gives no weight.
                "history": torch.zeros_like(inputs[: len(x)]) if table.multistep else None,
                "kept": None if known is None else known.kept,
            }
        )
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.native = backend.serves(x)

    def use(self, tensors: dict) -> None:
        self.tensors, inputs = tensors, tensors["inputs"]
        # Under guidance the first half of the inputs is to be a copy of the sample.
        self.x = inputs if self.guidance == 1 else inputs[len(inputs) // 2 :]

    def advance(self, i: int) -> None:
        self._step(self.network.at(i), self.rows[i], *self.noise.at(i, self.x))

    def advance_on_device(self) -> None:
        """The step of the row that the device holds, and the next row: nothing of the host's."""
        row = self.tensors["row"]
        step = self.network.at_row(self.tensors["steps"], row)
        self._step(step, row, None, self.tensors["seeds"])
        row.add_(1)

    def _step(self, step, row: Tensor, noise: Tensor | None, seeds: Tensor | None) -> None:
        tensors, x = self.tensors, self.x
        inputs = tensors["inputs"]
        if inputs is not x:
            inputs[: len(x)].copy_(x)
        output = check_output(self.network.call(inputs, step, tensors["context"]), inputs)
        table = (tensors["coefficients"], tensors["timesteps"], row)
        arguments = (*table, noise, seeds, tensors["history"], self.clip, self.guidance)
        if self.native:
            backend.kernels().sampler_step_(x, output, *arguments)
        else:
            next_x, x0 = reference.sampler_step(x, output, *arguments)
            x.copy_(next_x)
            if tensors["history"] is not None:
                tensors["history"].copy_(x0)
        if tensors["kept"] is not None:
            x.copy_(keep(tensors["kept"], row, x))

    def result(self) -> Tensor:
        return self.x if self.x is self.tensors["inputs"] else self.x.clone()


class DifferentiableStepper:
    """A new sample at every step, for autograd to look back through. Args: as InPlaceStepper."""

    def __init__(
        self,
        network: CalledNetwork,
        table: StepTable,
        x: Tensor,
        noise: NoiseSource,
        guidance: float,
        known: Known | None = None,
    ):
        self.network, self.table, self.x = network, table, x
        self.noise, self.guidance = noise, guidance
        self.coefficients, self.timesteps = table.tensors(x.device, x.dtype)
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.history = torch.zeros_like(x) if table.multistep else None
        self.kept = None if known is None else known.kept

    def advance(self, i: int) -> None:
        inputs = self.x if self.guidance == 1 else torch.cat([self.x, self.x])
        times = self.network.at(i).clone()  # the backward may look at it
        output = check_output(self.network.call(inputs, times, self.network.context), inputs)
        row, (noise, seeds) = self.rows[i], self.noise.at(i, self.x)
        arguments = (self.coefficients, self.timesteps, row, noise, seeds, self.history)
        self.x, x0 = sampler_step(
            self.x, output, *arguments, self.table.clip, self.guidance, return_x0=True
        )
        if self.history is not None:
            self.history = x0
        if self.kept is not None:
            self.x = keep(self.kept, row, self.x)

    def result(self) -> Tensor:
        return self.x


def check_output(output, inputs: Tensor) -> Tensor:
    """The model's output in the sample's dtype; autocast models give half precision."""
    if not isinstance(output, Tensor) or output.shape != inputs.shape:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"model: wanted an output of shape {list(inputs.shape)}, got {got}")
    return output if output.dtype == inputs.dtype else output.to(inputs.dtype)


def draws(generator: torch.Generator, shape, dtype, device) -> Callable[..., Tensor]:
    """A noise source that takes torch.randn's next numbers from the generator."""

    def draw(*_) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        return noise.to(device)

    return draw
