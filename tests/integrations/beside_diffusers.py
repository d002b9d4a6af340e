"""Our traced schedulers beside diffusers' own: configurations for hypothesis, what each constructor
takes and more of it than fits together, and runs of both that are compared step by step.

What diffusers refuses, ours has to refuse alike.
"""

from __future__ import annotations

import inspect
from functools import partial

import diffusers as theirs
import torch
from hypothesis import assume
from hypothesis import strategies as st

from diffusion_ext.integrations import diffusers as ours
from diffusion_ext.integrations.diffusers.traced_scheduler import TracedScheduler

NAMES = [n for n in ours.__all__ if issubclass(getattr(ours, n), TracedScheduler)]

EPS = {torch.float64: 2**-23, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPE = (2, 3, 6, 5)

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
    own = ("_run", "_seeds", "noise", "exact_coefficients")
    hidden = (*own, "_internal_dict", "noise_sampler")
    return {name: value for name, value in vars(scheduler).items() if name not in hidden}


def tensors_of(state: dict) -> list[torch.Tensor]:
    values = [v for value in state.values() for v in (value if type(value) is list else [value])]
    return [v for v in values if isinstance(v, torch.Tensor) and v.dim() > 1]


def started(name, config, start):
    """diffusers' scheduler and ours, or None where both refuse alike."""
    made = []
    for library in (theirs, ours):

        def new(library=library):
            scheduler = getattr(library, name)(**config, **extra(name))
            start(scheduler)
            return scheduler

        made.append(attempt(new))
    (them, refused), (us, we_refused) = made
    assert type(refused) is type(we_refused)
    return None if refused else (them, us)


def scaled(scheduler, x, t):
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def draws(scheduler) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def assert_near(got, want, dtype, scale):
    """Equal to a few roundings of the dtype, relative to the numbers that were added up."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    error = (got.double() - want.double()).abs().nan_to_num(nan=0.0, posinf=0.0)
    assert error.max() <= 64 * EPS[dtype] * scale


def same_state(us, them, dtype, scale):
    """In diffusers' attributes lies what diffusers keeps there."""
    mine, other = state_of(us), state_of(them)
    for name, value in other.items():
        pairs = [(mine[name], value)]
        if isinstance(value, list) and isinstance(mine[name], list):
            assert len(value) == len(mine[name]), name
            pairs = list(zip(mine[name], value, strict=True))
        for ours_, theirs_ in pairs:
            if isinstance(theirs_, torch.Tensor) and theirs_.dim() > 1:
                near = ours_.to(theirs_.dtype)  # diffusers widens some of its state
                assert_near(near, theirs_, dtype, scale)
            elif isinstance(theirs_, torch.Tensor):
                torch.testing.assert_close(ours_, theirs_, equal_nan=True)
            elif theirs_ is None or isinstance(theirs_, (bool, int, float, str)):
                assert ours_ == theirs_, name


def largest(*tensors) -> float:
    finite = [t.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item() for t in tensors]
    return 1.0 + max(finite)


def same_runs(them, us, dtype, step_options=None, layout=None, m_dtype=None, change=None):
    """Every step of a run from the same samples, with generators in the same state."""
    step_options, amplified = step_options or {}, 1.0
    if hasattr(them, "alphas_cumprod"):
        amplified = float(them.alphas_cumprod.min().clamp(min=2**-24)) ** -0.5
    divided = 1.0  # what is kept may be a difference divided by σ, rounded before it in theirs
    if hasattr(them, "sigmas"):
        divided = 1 / them.sigmas[them.sigmas > 0].min().clamp(max=1).item()
    rounded = divided if "FlowMatchHeun" in type(us).__name__ else 1.0  # its results are so too
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    x = torch.randn(SHAPE).to(dtype)
    torch.testing.assert_close(them.timesteps, us.timesteps, atol=0, rtol=0, equal_nan=True)
    for i, t in enumerate(us.timesteps):
        if change is not None:
            us = change(us, i)
        inputs = scaled(them, x, t), scaled(us, x, t)
        assert_near(inputs[1], inputs[0], dtype, largest(x))
        m = torch.randn(SHAPE).to(m_dtype or dtype)
        if layout == "strided":
            x, m = (v.transpose(-1, -2).contiguous().transpose(-1, -2) for v in (x, m))
        generators = [{"generator": g} if draws(them) else {} for g in noise]
        want, refused = attempt(partial(them.step, m, t, x, **generators[0], **step_options))
        got, we_refused = attempt(partial(us.step, m, t, x, **generators[1], **step_options))
        assert type(refused) is type(we_refused)
        if refused:
            return
        assert type(got) is type(want)
        assert list(got) == list(want)
        # The data prediction, which some do not show, is as large as this.
        scale = amplified * largest(x, m, *want.values(), *tensors_of(state_of(them)))
        coarse = max((dtype, m.dtype), key=EPS.get)
        assume(coarse != torch.float16 or scale < 6e4)
        for name in want:
            assert_near(got[name], want[name], coarse, scale * rounded)
        same_state(us, them, coarse, scale * divided)
        assert torch.equal(noise[0].get_state(), noise[1].get_state())
        if any(value.isnan().any() for value in want.values()):
            return  # in theirs NaN stays, where a weight of 0 of ours does not read it
        x = want.prev_sample.clamp(-8, 8).nan_to_num()
