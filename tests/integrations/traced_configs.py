"""Configurations of diffusers' schedulers for hypothesis: what each constructor takes, and more of
it than fits together. What diffusers refuses, ours has to refuse alike."""

from __future__ import annotations

import inspect

import diffusers as theirs
import torch
from hypothesis import strategies as st

from diffusion_ext.integrations import diffusers as ours
from diffusion_ext.integrations.diffusers.traced_scheduler import TracedScheduler

NAMES = [n for n in ours.__all__ if issubclass(getattr(ours, n), TracedScheduler)]

DPM_SOLVERS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
VALUES = {
    "num_train_timesteps": [48, 100, 1000],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "beta_start": [0.0001, 0.00085],
    "beta_end": [0.012, 0.02],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [True],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "use_flow_sigmas": [True],
    "flow_shift": [1.0, 3.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "interpolation_type": ["linear", "log_linear"],
    "timestep_type": ["discrete", "continuous"],
    "sigma_schedule": ["karras", "exponential"],
    "solver_order": [1, 2, 3],
    "algorithm_type": [*DPM_SOLVERS, "data_prediction", "noise_prediction"],
    "solver_type": ["midpoint", "heun", "bh1", "bh2"],
    "predict_x0": [True, False],
    "predictor_order": [1, 2, 3],
    "corrector_order": [1, 2, 3, 4],
    "lower_order_final": [True, False],
    "euler_at_final": [True, False],
    "disable_corrector": [[], [0], [1, 2]],
    "thresholding": [True],
    "dynamic_thresholding_ratio": [0.5, 0.995],
    "sample_max_value": [1.0, 1.7],
    "clip_sample": [True, False],
    "clip_sample_range": [0.5, 1.0, 2.0],
    "set_alpha_to_one": [True, False],
    "skip_prk_steps": [True, False],
    "shift": [1.0, 3.0],
    "use_dynamic_shifting": [True],
    "stochastic_sampling": [True],
    "invert_sigmas": [True],
}
OPTIONS = {  # of a step
    "order": [1, 2, 3, 4],
    "eta": [0.0, 0.3, 1.0],
    "s_churn": [0.0, 1.0, 5.0],
    "s_noise": [1.0, 1.007],
}


def arguments(name: str) -> list[str]:
    return list(inspect.signature(getattr(theirs, name)).parameters)


def configs(name: str):
    fitting = {key: st.sampled_from(VALUES[key]) for key in VALUES if key in arguments(name)}
    return st.fixed_dictionaries({}, optional=fitting)


def options(name: str):
    known = inspect.signature(getattr(theirs, name).step).parameters
    fitting = {key: st.sampled_from(OPTIONS[key]) for key in OPTIONS if key in known}
    return st.fixed_dictionaries({}, optional=fitting)


def extra(name: str) -> dict:
    """What makes a scheduler repeatable."""
    return {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}


def attempt(call):
    """(result, None) or (None, the error)."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def state_of(scheduler) -> dict:
    """All that diffusers keeps: attribute -> value."""
    own = ("_run", "_seeds", "_scales_ahead", "_last", "_scaled", "noise", "exact_coefficients")
    hidden = (*own, "_internal_dict", "noise_sampler")
    return {name: value for name, value in vars(scheduler).items() if name not in hidden}


def tensors_of(state: dict) -> list[torch.Tensor]:
    values = [v for value in state.values() for v in (value if type(value) is list else [value])]
    return [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1]
