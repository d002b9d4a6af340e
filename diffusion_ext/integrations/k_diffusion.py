"""k-diffusion's samplers on the fused step: its names, its arguments, its samples.

    import diffusion_ext.integrations.k_diffusion as K
    x = K.sampling.sample_dpmpp_2m(model, x, sigmas, extra_args={"cond": c})

A model is a denoiser(x [B,*], sigma [B], **extra_args) of x = x0 + sigma·ε, which returns x0. With
the same noise the samples are k-diffusion's, to rounding. What is not here (models, other samplers)
is looked up in k-diffusion, where that is installed.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import check_choice, check_sample, shown
from ..ops.sampler_step import sampler_step
from ..samplers import StepTable, grids, karras, tabulate
from ..samplers.adams import lms_rule
from ..samplers.dpm_solver import SOLVERS, multistep_rule
from ..samplers.karras import Ancestral, Churn
from ..sampling.stepping import check_output

__all__ = [
    "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpmpp_2m", "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral", "sample_dpmpp_3m_sde", "sample_dpmpp_sde", "sample_euler",
    "sample_euler_ancestral", "sample_heun", "sample_lms", "sampling",
]  # fmt: skip

sampling = sys.modules[__name__]  # k-diffusion has them in a module of that name
Denoiser = Callable[..., Tensor]  # (x [B,*], sigma [B], **extra_args) -> x0 [B,*]
Options = dict[str, Any] | None
Callback = Callable[[dict[str, Any]], Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor] | str | None  # (sigma, next sigma) -> [B,*]
COUNTER = "counter"  # as a noise_sampler: noise made in the kernel


def __getattr__(name: str):
    for module in ("k_diffusion.sampling", "k_diffusion"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise AttributeError(f"{__name__} has no {name!r}, nor has k-diffusion, if it is installed")


def sample_euler(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler's method: `diffusion_ext.euler`.

    Args:
        model: denoiser(x [B,*], sigma [B], **extra_args) -> x0 [B,*]. x: [B,*], at sigmas[0].
        sigmas: [n+1], descending; a last one of 0 is the clean image. extra_args: a dict, or None.
        callback: callback({"x", "i", "sigma", "sigma_hat", "denoised"}) after a step's first call.
        disable: no progress bar; None shows one on a terminal.
        s_churn, s_tmin, s_tmax, s_noise: as in `diffusion_ext.euler`.

    Returns: [B,*], at sigmas[-1]. Raises: TypeError, ValueError.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    return run.churned(karras.euler_rule, s_churn, s_tmin, s_tmax, s_noise)


def sample_heun(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Heun's method: `diffusion_ext.heun`. Args, returns and raises as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    return run.churned(karras.heun_rule, s_churn, s_tmin, s_tmax, s_noise)


def sample_dpm_2(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2: `diffusion_ext.dpm2`. Args, returns and raises as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    return run.churned(karras.dpm2_rule, s_churn, s_tmin, s_tmax, s_noise)


def sample_lms(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None, order: int = 4
) -> Tensor:  # fmt: skip
    """Linear multistep: `diffusion_ext.lms`. Args, returns and raises as `sample_euler`."""
    check_choice("order", order, (1, 2, 3, 4))
    return _Run(model, x, sigmas, extra_args, callback, disable).through(lms_rule, order=order)


def sample_dpmpp_2m(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M): `diffusion_ext.dpmpp_2m`. Args, returns and raises as `sample_euler`."""
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    return run.through(multistep_rule, **_of_multistep(2, "midpoint", 0.0, 1.0))


def sample_euler_ancestral(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
) -> Tensor:  # fmt: skip
    """Euler with noise: `diffusion_ext.euler_ancestral`.

    Args: as `sample_euler`; noise_sampler: noise(sigma, sigma_next) -> [B,*]; None is
        torch.randn_like, "counter" the kernel's own noise, of seeds from torch's generator.

    Returns and raises as `sample_euler`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or (lambda *_: torch.randn_like(x))
    return run.through(karras.euler_ancestral_rule, noise_sampler, noise=Ancestral(eta, s_noise))


def sample_dpm_2_ancestral(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 with noise: `diffusion_ext.dpm2_ancestral`.

    Args, returns and raises as `sample_euler_ancestral`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or (lambda *_: torch.randn_like(x))
    return run.through(karras.dpm2_ancestral_rule, noise_sampler, noise=Ancestral(eta, s_noise))


def sample_dpmpp_2s_ancestral(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with noise: `diffusion_ext.dpmpp_2s_ancestral`.

    Args, returns and raises as `sample_euler_ancestral`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or (lambda *_: torch.randn_like(x))
    return run.through(karras.dpmpp_2s_ancestral_rule, noise_sampler, noise=Ancestral(eta, s_noise))


def sample_dpmpp_sde(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None, r: float = 1 / 2,
) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE: `diffusion_ext.dpmpp_sde`.

    Args: as `sample_euler_ancestral`, but that a noise_sampler of None is a Brownian motion over
        sigma (torchsde's, as in k-diffusion). Returns and raises as that.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    noise_sampler = noise_sampler or BrownianNoise(x, sigmas)
    return run.through(karras.dpmpp_sde_rule, noise_sampler, noise=Ancestral(eta, s_noise), r=r)


def sample_dpmpp_2m_sde(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
    solver_type: str = "midpoint",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) for the SDE: `diffusion_ext.dpmpp_2m_sde`.

    Args: as `sample_dpmpp_sde`; solver_type: "midpoint" or "heun". Returns and raises as that.
    """
    check_choice("solver_type", solver_type, SOLVERS)
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    options = _of_multistep(2, solver_type, eta, s_noise)
    return run.through(multistep_rule, noise_sampler or BrownianNoise(x, sigmas), **options)


def sample_dpmpp_3m_sde(
    model: Denoiser, x: Tensor, sigmas: Tensor, extra_args: Options = None,
    callback: Callback = None, disable: bool | None = None,
    eta: float = 1.0, s_noise: float = 1.0, noise_sampler: NoiseSampler = None,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(3M) for the SDE: `diffusion_ext.dpmpp_3m_sde`.

    Args, returns and raises as `sample_dpmpp_sde`.
    """
    run = _Run(model, x, sigmas, extra_args, callback, disable)
    options = _of_multistep(3, "heun", eta, s_noise)
    return run.through(multistep_rule, noise_sampler or BrownianNoise(x, sigmas), **options)


def _of_multistep(order: int, solver: str, eta: float, s_noise: float) -> dict:
    return {
        "order": order, "solver": solver, "eta": eta, "s_noise": s_noise, "ends_lower": False
    }  # fmt: skip


@functools.lru_cache(maxsize=32)  # making one takes as long as its steps
def _table(rule: Callable, options: tuple, sigmas: tuple[float, ...]) -> StepTable:
    return tabulate(partial(rule, **dict(options)), grids.of_sigmas(np.array(sigmas)), None, "x0")


class _Run:
    """A run of a sampler's rule through sigmas, every argument as `sample_euler` has it."""

    def __init__(self, model, x, sigmas, extra_args, callback, disable):
        check_sample("x", x)
        if not isinstance(sigmas, Tensor) or sigmas.dim() != 1:
            raise TypeError(f"sigmas: wanted a tensor [n+1], got {shown(sigmas)}")
        self.model, self.x, self.given, self.extra = model, x, sigmas, extra_args or {}
        self.callback, self.disable = callback, disable
        self.sigmas = sigmas.cpu().double().numpy()
        if not (self.sigmas[:-1] > 0).all() or not (self.sigmas[-1:] >= 0).all():
            got = shown(self.sigmas.tolist())
            raise ValueError(
                f"sigmas: wanted numbers above 0, the last of which may be 0, got {got}"
            )

    @torch.no_grad()
    def through(self, rule: Callable, draw=None, each_step: bool = False, **options) -> Tensor:
        """Args:
        draw: draw(sigma, sigma_next) -> noise, "counter", or None for a rule without noise.
        each_step: whether it is drawn after every step but the last, wanted or not.
        options: of the rule.
        """
        if len(self.sigmas) < 2:
            return self.x
        try:
            table = _table(rule, tuple(options.items()), tuple(self.sigmas.tolist()))
        except (
            ArithmeticError,
            ValueError,
        ) as error:  # roots and quotients of steps upwards, or of 0
            got = shown(self.sigmas.tolist())
            raise ValueError(
                f"sigmas: this sampler has no steps of this kind; wanted them descending, got {got}"
            ) from error
        x, step, counted = self.x, -1, isinstance(draw, str)
        if counted:
            check_choice("noise_sampler", draw, (COUNTER,))
        seeds = torch.randint(2**63 - 1, x.shape[:1], device=x.device) if counted else None
        tensors, slots = table.tensors(x.device, x.dtype), table.new_slots(x)
        rows = torch.arange(len(table), device=x.device).unbind()
        sigma, noisy, begins = table.levels[:, 1].tolist(), table.noisy.tolist(), table.begins
        ends = [*begins[1:].tolist(), True]  # a step with the row
        levels = self.given.new_tensor(sigma).unbind()  # at once: each transfer waits for a GPU
        with tqdm(total=len(self.sigmas) - 1, disable=self.disable) as bar:
            for i, row in enumerate(rows):
                denoised = self.model(x, x.new_full(x.shape[:1], sigma[i]), **self.extra)
                denoised = check_output(denoised, x)
                if begins[i]:
                    step, start = step + 1, levels[i]
                    self._report(step, x, sigma[i], denoised)
                z = None
                drawn = noisy[i] or (each_step and ends[i] and i + 1 < len(table))
                if drawn and draw is not None and not counted:
                    z = draw(start, levels[i + 1]).to(x)
                z = z if noisy[i] else None
                x = sampler_step(x, denoised, *tensors, row, z, seeds, slots=slots)
                bar.update(int(ends[i]))
        return x

    def churned(self, rule: Callable, s_churn, s_tmin, s_tmax, s_noise) -> Tensor:
        """Through a rule with churn, of torch.randn_like's noise: before each step, as k-diffusion
        draws it; the first step's goes on the sample that the run is given."""
        churn = Churn(max(len(self.sigmas) - 1, 1), s_churn, s_tmin, s_tmax, s_noise)
        if s_churn == 0 or len(self.sigmas) < 2:
            return self.through(rule, churn=churn)
        grid, first = grids.of_sigmas(self.sigmas), torch.randn_like(self.x)
        raised = churn.raised(grid, grid.levels()[0]).sigma
        if raised > self.sigmas[0]:
            up = s_noise * math.sqrt(raised**2 - self.sigmas[0] ** 2)
            self.x = self.x + up * first
        draw = lambda *_: torch.randn_like(self.x)  # noqa: E731
        return self.through(rule, draw, each_step=True, churn=churn)

    def _report(self, step: int, x: Tensor, sigma_hat: float, denoised: Tensor) -> None:
        if self.callback is not None:
            hat = self.given.new_tensor(sigma_hat)
            state = {"x": x, "i": step, "sigma": self.given[step], "sigma_hat": hat}
            self.callback(state | {"denoised": denoised})


class BrownianNoise:
    """noise(sigma, sigma_next): the change of a Brownian motion from one to the other, over √ of
    their distance, so that runs of other steps see the same motion.

    Args: x: like the samples. sigmas: [n+1]. The seed is drawn from torch's default generator.
    """

    def __init__(self, x: Tensor, sigmas: Tensor):
        try:
            import torchsde
        except ImportError as error:
            raise ImportError(
                "noise_sampler: the default is torchsde's Brownian motion: pip install torchsde, "
                'or noise_sampler="counter" for noise made in the kernel'
            ) from error
        low, high = sigmas[sigmas > 0].min(), sigmas.max()
        seed = torch.randint(0, 2**63 - 1, []).item()
        self.motion = torchsde.BrownianTree(low, torch.zeros_like(x), high, entropy=seed)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        low, high = sorted((sigma, sigma_next))
        sign = 1 if sigma_next > sigma else -1
        return sign * self.motion(low, high) / (high - low).sqrt()
