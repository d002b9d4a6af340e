"""The steps of a run: the network, a row of the table, and what is kept of an image.

A stepper has the sample `x` [B,*], `advance(i)`, which does step i, and `result()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_like, kind
from ..ops import backend, reference
from ..ops.sampler_step import sampler_step
from ..samplers import StepTable
from .conditioning import conditional
from .networks import CalledNetwork, PreparedNetwork


class NoiseSource:
    """The noise of each step.

    Args:
        seeds: int64 [B]. noise: noise(step_index, timestep) -> [B,*] in place of theirs, or None.
    """

    def __init__(self, table: StepTable, seeds: Tensor, noise: Callable | None):
        self._wanted = table.noisy.tolist()
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
        guidance: 1 for none, where the table has no scales of its own; else the network's batch is
            doubled, the context's first half the null one.
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
        self.guided, self.alone = is_guided(table, guidance), runs_alone(table)
        batch = (2 if self.guided else 1) * len(x)
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
                "slots": table.new_slots(inputs[: len(x)]),
                "kept": None if known is None else known.kept,
            }
        )
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.native = backend.serves(x)

    def use(self, tensors: dict) -> None:
        self.tensors, inputs = tensors, tensors["inputs"]
        # Under guidance the first half of the inputs is to be a copy of the sample.
        self.x = inputs[len(inputs) // 2 :] if self.guided else inputs

    def advance(self, i: int) -> None:
        row, alone = self.rows[i], self.alone[i]
        self._step(self.network.at(i), row, alone, *self.noise.at(i, self.x))

    def advance_on_device(self, alone: bool) -> None:
        """The step of the row that the device holds, and the next row: nothing of the host's."""
        row = self.tensors["row"]
        step = self.network.at_row(self.tensors["steps"], row)
        self._step(step, row, alone, None, self.tensors["seeds"])
        row.add_(1)

    def _step(self, step, row: Tensor, alone: bool, noise, seeds) -> None:
        tensors, x = self.tensors, self.x
        inputs, context = tensors["inputs"], tensors["context"]
        if alone:
            inputs, (step, context) = x, conditional((step, context), len(x))
        elif self.guided:
            inputs[: len(x)].copy_(x)
        output = check_output(self.network.call(inputs, step, context), inputs)
        table = (tensors["coefficients"], tensors["timesteps"], row)
        arguments = (*table, noise, seeds, tensors["slots"], self.clip, self.guidance)
        if self.native:
            backend.kernels().sampler_step_(x, output, *arguments)
        else:
            next_x, _, slots = reference.sampler_step_with_slots(x, output, *arguments)
            x.copy_(next_x)
            if slots is not None:
                tensors["slots"].copy_(slots)
        if tensors["kept"] is not None:
            x.copy_(keep(tensors["kept"], row, x))

    def result(self) -> Tensor:
        return self.x.clone() if self.guided else self.x


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
        self.guided, self.alone = is_guided(table, guidance), runs_alone(table)
        self.coefficients, self.timesteps = table.tensors(x.device, x.dtype)
        self.rows = torch.arange(len(table), device=x.device).unbind()
        self.slots = table.new_slots(x)
        self.kept = None if known is None else known.kept

    def advance(self, i: int) -> None:
        times = self.network.at(i).clone()  # the backward may look at it
        inputs, context = self.x, self.network.context
        if self.alone[i]:
            times, context = conditional((times, context), len(self.x))
        elif self.guided:
            inputs = torch.cat([self.x, self.x])
        output = check_output(self.network.call(inputs, times, context), inputs)
        table = (self.coefficients, self.timesteps, self.rows[i])
        options = {"clip": self.table.clip, "guidance": self.guidance, "slots": self.slots}
        noise, seeds = self.noise.at(i, self.x)
        self.x = sampler_step(self.x, output, *table, noise, seeds, **options)
        if self.kept is not None:
            self.x = keep(self.kept, self.rows[i], self.x)

    def result(self) -> Tensor:
        return self.x


def is_guided(table: StepTable, guidance: float) -> bool:
    """Whether a run calls its model on two halves, without and with the context."""
    return guidance != 1 or table.guidance is not None


def runs_alone(table: StepTable) -> list[bool]:
    """For each row, whether its scale is 1, for which the half with the context is enough."""
    scales = table.guidance
    return [False] * len(table) if scales is None else (scales == 1).tolist()


def check_output(output, inputs: Tensor) -> Tensor:
    """The model's output in the sample's dtype; autocast models give half precision."""
    if not isinstance(output, Tensor) or output.shape != inputs.shape:
        got = list(output.shape) if isinstance(output, Tensor) else kind(output)
        raise ValueError(f"model: wanted an output of shape {list(inputs.shape)}, got {got}")
    return output if output.dtype == inputs.dtype else output.to(inputs.dtype)


def draws(generator: torch.Generator, shape, dtype, device) -> Callable[..., Tensor]:
    """A noise source that takes torch.randn's next numbers from the generator."""

    def draw(*_) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
        return noise.to(device)

    return draw
