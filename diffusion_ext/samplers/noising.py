"""Training on a schedule: clean samples noised (`perturb`), and the loss of what a model makes of
them (`denoising_loss`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    as_seeds,
    as_timestep,
    check_at_least_0,
    check_choice,
    check_device,
    check_like,
    check_sample,
)
from ..ops.denoising_loss import loss_by_table
from ..ops.perturb import LEARNED, perturb_by_table
from .noise import resolve_noise
from .rows import PREDICTIONS
from .schedules import NoiseSchedule, check_schedule

TARGETS = tuple(LEARNED)
# How x_t is made of x0 and ε: the names of the tables of their weights.
NOISINGS = {
    "standard": ("signal", "sigma"),
    "course": ("signal", "variance"),
    "flow": ("flow_signal", "flow_sigma"),
}


def perturb(
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | torch.Generator | None = None,
    seeds: int | Tensor | None = None,
    target: str | None = "noise",
    noising: str = "standard",
) -> tuple[Tensor, Tensor | None]:
    """Noise clean samples to timestep t: x_t = √ᾱ_t x0 + √(1-ᾱ_t) ε (Ho et al. 2020, eq. 4).

    Args:
        x0: [B, *], clean samples; any floating dtype, memory format and strides.
        t: from 0 to T: integers [B], or one for all samples.
        schedule: the noise schedule.
        noise: ε [B, *] in x0's dtype, or a torch.Generator to draw it from.
        seeds: int64 [B] or an int (sample b gets seeds + b): ε is made in the kernel, stream 2.
            With neither noise nor seeds, the seeds come from torch's default generator.
        target: what a model learns: "noise" (ε), "v" (√ᾱ ε - √(1-ᾱ) x0, Salimans & Ho 2022), or
            None: it is not written, since `denoising_loss` makes it again from the seeds.
        noising: "standard"; "course", whose notebook forgot the root: (1-ᾱ_t) ε; or "flow", from
            image to noise in a straight line: (1 - t/T) x0 + t/T ε (Liu et al. 2022).

    Returns: (x_t, target), each [B, *], x0's dtype and memory format; the caller's own noise, where
    that is the target, is returned as it came, and None where there is no target.
    Raises: TypeError, ValueError for bad arguments; t on the host is checked to lie in 0..T.
    """
    check_sample("x0", x0)
    check_choice("target", target, TARGETS)
    t = _timesteps(x0, t, schedule, noising)
    noise, seeds = resolve_noise(x0, noise, seeds)
    if noise is not None:
        check_like("noise", noise, "x0", x0)
    tables = tables_of(schedule, NOISINGS[noising], x0.device, x0.dtype)
    x_t, learned = perturb_by_table(x0, t, *tables, noise, seeds, LEARNED[target])
    if target is None:
        return x_t, None
    # The kernel writes no second copy of a noise that the caller holds.
    return x_t, noise if target == "noise" and noise is not None else learned


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    t: int | Tensor,
    schedule: NoiseSchedule,
    noise: Tensor | None = None,
    seeds: int | Tensor | None = None,
    prediction: str = "epsilon",
    delta: float | None = None,
    noising: str = "standard",
) -> Tensor:
    """The loss of each sample, in one read of the model's output: its target is never stored.

        loss_b = mean over the elements of (model_output - target)²    (Ho et al. 2020, eq. 14)

    Args:
        model_output: [B, *], of x_t = perturb(x0, t, schedule, noise, seeds, noising=noising)[0].
        x0: [B, *] clean samples, in model_output's dtype or float32.
        t, schedule, noising: as they were for `perturb`.
        noise: the ε given to perturb, in x0's dtype. seeds: those given to perturb, from which the
            kernel makes the noise again, in the forward and the backward pass. One of them, but for
            prediction "x0", which has no noise in its target.
        prediction: what the model predicts: "epsilon", "v" (√ᾱ ε - √(1-ᾱ) x0), "x0", or "flow"
            (ε - x0).
        delta: of Huber's penalty in place of the square: r²/2 up to delta, delta·(|r| - delta/2)
            beyond.

    Returns: [B], float32 (float64 for a float64 output), differentiable: take its mean.
    Raises: TypeError, ValueError for bad arguments.
    """
    check_sample("model_output", model_output)
    check_choice("prediction", prediction, PREDICTIONS)
    _check_data(x0, model_output)
    if delta is not None:
        check_at_least_0("delta", delta)
        if delta == 0:
            raise ValueError("delta: wanted a number above 0 or None, got 0")
    t = _timesteps(model_output, t, schedule, noising)
    names = target_weights(prediction, noising)
    tables = tables_of(schedule, names, model_output.device, model_output.dtype)
    noise, seeds = _noise_again(model_output, noise, seeds, prediction, x0)
    x0 = None if prediction == "epsilon" else x0
    return loss_by_table(model_output, t, *tables, x0, noise, seeds, delta)


def target_weights(prediction: str, noising: str) -> tuple[str, str]:
    """The names of the tables of a target's weights: of_x0[t]·x0 + of_noise[t]·ε."""
    signal, sigma = NOISINGS[noising]
    return {
        "epsilon": ("zero", "one"),
        "v": (f"-{sigma}", signal),
        "x0": ("one", "zero"),
        "flow": ("-one", "one"),
    }[prediction]


def tables_of(schedule: NoiseSchedule, names: tuple[str, str], device, dtype: torch.dtype):
    """Two tables by name, [T+1] each on device, in float32 or, for float64 samples, float64."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return schedule.constant(_tables, names, device, dtype)


def _tables(schedule: NoiseSchedule, names, device, dtype) -> tuple[Tensor, ...]:
    return tuple(schedule.tensor(name, device, dtype) for name in names)


def _timesteps(x: Tensor, t, schedule: NoiseSchedule, noising: str) -> Tensor:
    """int64 [B] on x's device."""
    check_schedule(schedule)
    check_choice("noising", noising, tuple(NOISINGS))
    t = as_timestep("t", t, x, 0, schedule.timesteps)
    if not isinstance(t, Tensor):
        t = torch.full(x.shape[:1], t, device=x.device)
    return t.expand(x.shape[:1])


def _check_data(x0, output: Tensor) -> None:
    """x0 has the output's shape and device, and its dtype or float32."""
    check_sample("x0", x0)
    if x0.dtype != torch.float32 or output.dtype == torch.float64:
        check_like("x0", x0, "model_output", output)
    elif x0.shape != output.shape:
        raise ValueError(
            f"x0: wanted model_output's shape {list(output.shape)}, got {list(x0.shape)}"
        )
    check_device("x0", x0, output.device)


def _noise_again(output: Tensor, noise, seeds, prediction: str, x0: Tensor):
    """(noise, seeds [B]), as the target has them: neither where it has no noise."""
    if noise is not None and seeds is not None:
        raise ValueError("noise, seeds: wanted one of them, got both")
    if noise is not None:
        check_like("noise", noise, "x0", x0)
    if seeds is not None:
        seeds = as_seeds(seeds, output.shape[0], output.device)
    if prediction == "x0":
        return None, None
    if noise is None and seeds is None:
        raise ValueError("noise, seeds: wanted what perturb was given, got neither")
    return noise, seeds
