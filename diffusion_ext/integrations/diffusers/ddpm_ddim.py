"""DDPMScheduler and DDIMScheduler: a row for every timestep, computed from the formulas."""

from __future__ import annotations

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from ...ops import philox_normal, reference
from . import noising
from .drop_in import drop_in
from .rows import FINAL, UNKNOWN, ddim_rows, ddpm_rows, log_variances, next_in_run
from .runs import TableRun
from .table_scheduler import TableScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler"]

LEARNED = ("learned", "learned_range")


@drop_in(noise="generator", exact_coefficients=False)
class DDPMScheduler(TableScheduler, diffusers.DDPMScheduler):
    """diffusers.DDPMScheduler (Ho et al. 2020) with the step, add_noise and get_velocity fused.

    Args: diffusers' own, and
        noise: "generator" draws as diffusers does; "counter" makes the noise in the kernel, from
            the seeds of `set_seeds`. A learned variance scales a noise tensor that is made before
            the kernel either way.
        exact_coefficients: compute the weights of a step in float64, rounded once, in place of
            diffusers' float32, whose errors of up to 1e-4 a seed's images have in them.
    """

    add_noise, get_velocity = noising.add_noise, noising.get_velocity

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None):
        """As diffusers': num_inference_steps evenly spaced timesteps, or those of a list."""
        super().set_timesteps(num_inference_steps, "cpu", timesteps)
        self._start_run(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:
        """The sample at the run's next timestep, as diffusers' step.

        Args:
            model_output: [B, C, *], or [B, 2C, *] with a learned variance; sample: [B, C, *].
            timestep: one of the scheduler's, an int or a tensor on any device. Where only another
                device knows it (a copy, not an element of `timesteps`), noise is drawn at
                timestep 0 too and not used, and a timestep that is not of the run gives NaN.
            generator: one, or one per sample.
        Returns: prev_sample and pred_original_sample [B, C, *]. Raises: what diffusers raises;
            ValueError where zero terminal SNR leaves an epsilon model no x0.
        """
        m, predicted = self._split(model_output, sample)
        if not self._fits(m, timestep, sample) or not self._has_variance(predicted):
            return super().step(model_output, timestep, sample, generator, return_dict)
        run = self._current_run()
        t = self._locate(run, timestep)
        noise = seeds = None
        if t != 0:
            noise, seeds = self._draw(m, generator, m.dtype)
            if predicted is not None:
                noise, seeds = self._scaled(run, predicted, t, timestep, noise, seeds), None
        previous, x0 = self._apply(run, (), m, sample, t, timestep, noise, seeds)
        if not return_dict:
            return previous, x0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _previous(self, timesteps: np.ndarray) -> np.ndarray:
        count = len(self.alphas_cumprod)
        if self.custom_timesteps or self.num_inference_steps:
            return next_in_run(timesteps, count)
        return np.arange(count) - 1

    def _weights(self, run: TableRun) -> np.ndarray:
        variance, prediction = self.config.variance_type, self.config.prediction_type
        return ddpm_rows(run.alpha_bar, run.previous, variance, prediction, self._clipped())

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the prediction, the variance's values or None), each [B, C, *]."""
        learned = self.variance_type in LEARNED
        if learned and model_output.shape[1] == 2 * sample.shape[1]:
            return torch.split(model_output, sample.shape[1], dim=1)
        return model_output, None

    def _has_variance(self, predicted: Tensor | None) -> bool:
        same = self.variance_type == self.config.variance_type
        return same and (self.variance_type in LEARNED) == (predicted is not None)

    def _scaled(self, run, predicted, t, timestep, noise, seeds) -> Tensor:
        """σ·z [B, C, *], wide: σ² is the model's, or lies between β̃ and β as it says."""
        device = predicted.device
        if t is None:  # only the device knows it
            t = timestep.reshape(()).to(device, torch.int64)
        if noise is None and isinstance(t, int):
            noise = philox_normal(seeds, predicted.shape, t + 1, stream=1, device=device)
        elif noise is None:  # the reference takes a step that only the device knows
            noise = reference.philox_normal(seeds, predicted.shape, t + 1, 1, torch.float32)
        wide = torch.promote_types(predicted.dtype, torch.float32)
        predicted, noise = predicted.to(wide), noise.to(wide)
        if self.variance_type == "learned":
            return predicted.sqrt() * noise
        logs = run.tensor(
            "logs", device, torch.float32, lambda: log_variances(run.alpha_bar, run.previous)
        )
        low, high = logs[t] if isinstance(t, int) else logs.index_select(0, t[None])[0]
        share = (predicted + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
        return torch.exp(0.5 * (share * high + (1 - share) * low)) * noise


@drop_in(noise="generator", exact_coefficients=False, exact_previous_timestep=False)
class DDIMScheduler(TableScheduler, diffusers.DDIMScheduler):
    """diffusers.DDIMScheduler (Song et al. 2021) with the step, add_noise and get_velocity fused.

    Args: diffusers' own; noise and exact_coefficients, as in DDPMScheduler;
        exact_previous_timestep: a step leads to the next of `timesteps`. diffusers, and the
        default, take t - T//n, which is another one where n does not divide T and with the spacing
        "linspace".
    """

    add_noise, get_velocity = noising.add_noise, noising.get_velocity

    def __init__(self, *args, exact_previous_timestep=False, **kwargs):
        super().__init__(*args, **kwargs)
        self._switch(exact_previous_timestep=bool(exact_previous_timestep))

    def set_timesteps(self, num_inference_steps, device=None):
        """As diffusers': num_inference_steps timesteps, spaced as timestep_spacing says."""
        super().set_timesteps(num_inference_steps, "cpu")
        self._start_run(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """The sample one step of T//n earlier, as diffusers' step.

        Args:
            model_output, sample: [B, *].
            timestep: an int or a tensor on any device.
            eta: 0 is deterministic, 1 has DDPM's posterior variance.
            use_clipped_model_output: take ε as what the clipped x0 leaves of the sample.
            generator: one, or one per sample; variance_noise: [B, *], noise in place of drawn.
        Returns: prev_sample and pred_original_sample [B, *]. Raises: what diffusers raises;
            ValueError where zero terminal SNR leaves an epsilon model no x0.
        """
        if not self._fits_ddim(model_output, timestep, sample, eta, generator, variance_noise):
            rest = eta, use_clipped_model_output, generator, variance_noise, return_dict
            return super().step(model_output, timestep, sample, *rest)
        run = self._current_run()
        t = self._locate(run, timestep)
        noise, seeds = variance_noise if eta > 0 else None, None
        if eta > 0 and noise is None:
            noise, seeds = self._draw(model_output, generator, model_output.dtype)
        options = float(eta), bool(use_clipped_model_output)
        previous, x0 = self._apply(run, options, model_output, sample, t, timestep, noise, seeds)
        if not return_dict:
            return previous, x0
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _fits_ddim(self, model_output, timestep, sample, eta, generator, variance_noise) -> bool:
        if self.num_inference_steps is None or not isinstance(eta, (int, float)):
            return False
        if eta > 0 and variance_noise is not None:
            fits = isinstance(variance_noise, Tensor) and variance_noise.shape == sample.shape
            if generator is not None or not fits:
                return False
        return self._fits(model_output, timestep, sample)

    def _previous(self, timesteps: np.ndarray) -> np.ndarray:
        count = len(self.alphas_cumprod)
        if self.num_inference_steps is None:
            return np.full(count, UNKNOWN)
        if self.exact_previous_timestep:
            return next_in_run(timesteps, count)
        stride = self.config.num_train_timesteps // self.num_inference_steps
        return np.maximum(np.arange(count) - stride, FINAL)

    def _weights(self, run: TableRun, eta: float, rederived: bool) -> np.ndarray:
        final, prediction = float(self.final_alpha_cumprod), self.config.prediction_type
        clipped = self._clipped()
        return ddim_rows(run.alpha_bar, run.previous, final, eta, prediction, clipped, rederived)
