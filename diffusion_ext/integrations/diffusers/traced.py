"""The schedulers of diffusers whose steps are traced: their names, and what each step changes."""

from __future__ import annotations

import diffusers
import numpy as np
import torch

from . import noising
from .drop_in import drop_in
from .traced_scheduler import TracedScheduler

__all__ = [
    "DDIMInverseScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]

traced = drop_in(noise="generator", exact_coefficients=False)


@traced
class DDIMInverseScheduler(TracedScheduler, diffusers.DDIMInverseScheduler):
    """From an image to the noise that DDIM makes it of (Mokady et al. 2022)."""

    counts, reads_timestep = (), True


@traced
class PNDMScheduler(TracedScheduler, diffusers.PNDMScheduler):
    """Pseudo-linear multistep (Liu et al. 2022)."""

    counts, reads_timestep = ("counter",), True
    keeps = ("ets", "cur_model_output", "cur_sample")
    add_noise = noising.add_noise


@traced
class IPNDMScheduler(TracedScheduler, diffusers.IPNDMScheduler):
    """PNDM without its Runge-Kutta start (Zhang and Chen 2022)."""

    keeps = ("ets",)


@traced
class LMSDiscreteScheduler(TracedScheduler, diffusers.LMSDiscreteScheduler):
    """Linear multistep over σ; its integrals are taken once, when a step is traced."""

    counts, keeps = ("_step_index", "is_scale_input_called"), ("derivatives",)


@traced
class EulerDiscreteScheduler(TracedScheduler, diffusers.EulerDiscreteScheduler):
    """Euler's method over σ, with churn (Karras et al. 2022, algorithm 2)."""

    counts = ("_step_index", "is_scale_input_called")


@traced
class EulerAncestralDiscreteScheduler(TracedScheduler, diffusers.EulerAncestralDiscreteScheduler):
    """Euler's method to a lower σ, and noise back up to the next."""

    counts = ("_step_index", "is_scale_input_called")


@traced
class EDMEulerScheduler(TracedScheduler, diffusers.EDMEulerScheduler):
    """Euler's method for networks with EDM's preconditioning (Karras et al. 2022)."""

    counts = ("_step_index", "is_scale_input_called")


@traced
class HeunDiscreteScheduler(TracedScheduler, diffusers.HeunDiscreteScheduler):
    """Heun's method over σ (Karras et al. 2022, algorithm 1)."""

    keeps = ("prev_derivative", "dt", "sample")


@traced
class KDPM2DiscreteScheduler(TracedScheduler, diffusers.KDPM2DiscreteScheduler):
    """DPM-Solver-2's midpoint, over σ."""

    keeps = ("sample",)


@traced
class KDPM2AncestralDiscreteScheduler(TracedScheduler, diffusers.KDPM2AncestralDiscreteScheduler):
    """DPM-Solver-2's midpoint to a lower σ, and noise back up to the next."""

    keeps = ("sample", "dt")

    def _exact_levels(self) -> None:
        """Where σ falls far, diffusers' σ_down, √(σ'² - σ_up²), is the root of a rounding error:
        NaN, and with it the middle and its timestep. Written out it is σ'²/σ."""
        sigmas = torch.cat([self.sigmas[:1], self.sigmas[1:-1:2]]).double()  # all but σ_0 are twice
        start, end = sigmas[:-1], sigmas[1:]
        down = end**2 / start
        up = end * ((start - end) * (start + end)).sqrt() / start
        middle = (start * down).sqrt()
        for name, values in (("up", up), ("down", down), ("interpol", middle)):
            doubled = torch.cat([values[:1], values[1:].repeat_interleave(2), values.new_zeros(3)])
            setattr(self, f"sigmas_{name}", doubled.to(self.sigmas.dtype))
        log_sigmas = self.log_sigmas.double().numpy()
        timesteps = [self._sigma_to_t(np.array(sigma), log_sigmas) for sigma in middle[:-1]]
        self.timesteps[1::2] = torch.tensor(np.array(timesteps), dtype=self.timesteps.dtype)


@traced
class DPMSolverMultistepScheduler(TracedScheduler, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++, and their SDEs, by steps before (Lu et al. 2022)."""

    counts, keeps = ("_step_index", "lower_order_nums"), ("model_outputs",)


@traced
class DPMSolverSinglestepScheduler(TracedScheduler, diffusers.DPMSolverSinglestepScheduler):
    """DPM-Solver and DPM-Solver++ by steps in between (Lu et al. 2022)."""

    keeps = ("model_outputs", "sample")


@traced
class DPMSolverSDEScheduler(TracedScheduler, diffusers.DPMSolverSDEScheduler):
    """DPM-Solver++ (SDE), its noise the increments of one Brownian motion.

    Two increments of a step overlap, so that independent normals cannot serve: noise="counter" is
    not to be had.
    """

    keeps = ("sample", "mid_point_sigma")
    noises = ("generator",)

    def _noise(self, trace, model_output, sample, generator, options):
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        if self.noise_sampler is None:
            low, high = self.sigmas[self.sigmas > 0].min().item(), self.sigmas.max().item()
            self.noise_sampler = BrownianTreeNoiseSampler(
                sample, low, high, self.noise_sampler_seed
            )
        return self.noise_sampler(*trace.between), None


@traced
class UniPCMultistepScheduler(TracedScheduler, diffusers.UniPCMultistepScheduler):
    """UniPC's predictor and corrector in one pass (Zhao et al. 2023)."""

    counts = ("_step_index", "lower_order_nums", "this_order")
    keeps, notes = ("model_outputs", "last_sample"), ("timestep_list",)


@traced
class DEISMultistepScheduler(TracedScheduler, diffusers.DEISMultistepScheduler):
    """Exponential integrator over polynomials of log ρ (Zhang and Chen 2022)."""

    counts, keeps = ("_step_index", "lower_order_nums"), ("model_outputs",)


@traced
class SASolverScheduler(TracedScheduler, diffusers.SASolverScheduler):
    """Stochastic Adams predictor and corrector in one pass (Xue et al. 2023)."""

    counts = ("_step_index", "lower_order_nums", "this_predictor_order", "this_corrector_order")
    keeps = ("timestep_list", "model_outputs", "last_sample", "last_noise")
    reads_timestep = True


@traced
class LCMScheduler(TracedScheduler, diffusers.LCMScheduler):
    """Latent consistency models (Luo et al. 2023)."""

    counts, reads_timestep = ("_step_index", "sigma_data"), True
    add_noise, get_velocity = noising.add_noise, noising.get_velocity


@traced
class TCDScheduler(TracedScheduler, diffusers.TCDScheduler):
    """Trajectory consistency distillation (Zheng et al. 2024)."""

    reads_timestep = True
    add_noise, get_velocity = noising.add_noise, noising.get_velocity


@traced
class FlowMatchEulerDiscreteScheduler(TracedScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler's method for flow matching (Esser et al. 2024)."""

    on_device = ("timesteps", "sigmas")


@traced
class FlowMatchHeunDiscreteScheduler(TracedScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
    """Heun's method for flow matching."""

    keeps, on_device = ("prev_derivative", "dt", "sample"), ("timesteps", "sigmas")
