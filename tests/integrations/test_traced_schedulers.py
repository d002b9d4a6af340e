"""Our schedulers whose steps are traced beside diffusers' own: results, state, errors, noise."""

from __future__ import annotations

import contextlib
import inspect
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

theirs = pytest.importorskip("diffusers")
from beside_diffusers import (  # noqa: E402
    EPS,
    NAMES,
    SHAPE,
    arguments,
    configs,
    draws,
    extra,
    options,
    same_runs,
    scaled,
    started,
)

import diffusion_ext as dx  # noqa: E402
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, *EPS])


@pytest.mark.parametrize("name", NAMES)
@given(st.data(), st.integers(1, 8), dtypes, st.sampled_from([None, "strided"]))
def test_steps_over_the_configurations(name, data, steps, dtype, layout):
    config, step_options = data.draw(configs(name)), data.draw(options(name))

    def start(scheduler):
        mu = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **mu)

    pair = started(name, config, start)
    if pair is not None:
        same_runs(*pair, dtype, step_options, layout)


@pytest.mark.parametrize("name", NAMES)
def test_samples_and_outputs_of_two_dtypes(name):
    """A video's sample is float32, its network's output bfloat16."""
    for dtype, m_dtype in itertools.permutations((torch.float32, torch.bfloat16)):
        pair = started(name, {}, lambda s: s.set_timesteps(5))
        same_runs(*pair, dtype, m_dtype=m_dtype)


@pytest.mark.parametrize("name", NAMES)
def test_one_generator_for_each_sample_and_tuples(name):
    them, us = started(name, {}, lambda s: s.set_timesteps(4))
    noise = [[torch.Generator().manual_seed(i) for i in range(SHAPE[0])] for _ in range(2)]
    x = torch.randn(SHAPE)
    for t in us.timesteps:
        scaled(them, x, t), scaled(us, x, t)
        generators = [{"generator": g} if draws(them) else {} for g in noise]
        want = them.step(x, t, x, return_dict=False, **generators[0])
        got = us.step(x, t, x, return_dict=False, **generators[1])
        assert type(got) is tuple
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        x = want[0].clamp(-8, 8)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "IPNDMScheduler"])  # theirs has none
def test_gradients_pass_through_a_run(name):
    them, us = started(name, {}, lambda s: s.set_timesteps(4))
    gradients = []
    for scheduler in (them, us):
        torch.manual_seed(3)
        start = torch.randn(SHAPE, requires_grad=True)
        x, noise = start, torch.Generator().manual_seed(5)
        for t in scheduler.timesteps:
            m = scaled(scheduler, x, t) * 0.5
            generator = {"generator": noise} if draws(scheduler) else {}
            x = scheduler.step(m, t, x, **generator).prev_sample
        gradients += torch.autograd.grad(x.sum(), start)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


NOISY = {  # with what makes them draw
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_of_the_kernel(name, monkeypatch):
    """Step k of a run has the normals of stream 1 and step k, from 1, of each sample's seed."""
    if not {*NOISY[name]} <= {*arguments(name)}:
        pytest.skip("this diffusers has no such argument")
    them = getattr(theirs, name)(**NOISY[name])
    us = getattr(ours, name)(**NOISY[name], noise="counter")
    seeds = torch.tensor([11, -3])
    us.set_seeds(seeds)
    module = inspect.getmodule(getattr(theirs, name))
    drawn = module.randn_tensor

    def made(shape, **options):
        if shape[0] != len(seeds):  # a trace draws for its own
            return drawn(shape, **options)
        return dx.philox_normal(seeds, tuple(shape), them.step_index + 1, stream=1)

    monkeypatch.setattr(module, "randn_tensor", made)
    them.set_timesteps(5), us.set_timesteps(5)
    x = torch.randn(SHAPE)
    for t in us.timesteps:
        scaled(them, x, t), scaled(us, x, t)
        m = torch.randn(SHAPE)
        want, got = them.step(m, t, x).prev_sample, us.step(m, t, x).prev_sample
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        x = want.clamp(-8, 8)


def test_noise_that_counters_cannot_make():
    with pytest.raises(ValueError, match=r"noise: wanted one of \('generator',\), got 'counter'"):
        ours.DPMSolverSDEScheduler(noise="counter")
    with pytest.raises(ValueError, match="noise: wanted one of"):
        ours.LCMScheduler(noise="dice")


@pytest.mark.parametrize("name", NAMES)
def test_exact_coefficients(name):
    """What diffusers computes in float64, at our levels: test_exact_levels.py holds those."""
    them = getattr(theirs, name)(**extra(name))
    exact = getattr(ours, name)(**extra(name), exact_coefficients=True)
    plain = getattr(ours, name)(**extra(name))
    for scheduler in (them, exact, plain):
        scheduler.set_timesteps(7)
    for attribute, value in vars(them).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(them, attribute, getattr(exact, attribute).double())
    x = torch.randn(SHAPE, dtype=torch.float64)
    errors = []
    for i in range(len(exact.timesteps)):
        m, made = torch.randn(SHAPE, dtype=torch.float64), []
        for scheduler in (them, exact, plain):
            torch.manual_seed(0)
            with Float64() if scheduler is them else contextlib.nullcontext():
                at = scheduler.timesteps[i]
                scaled(scheduler, x, at)
                made.append(scheduler.step(m, at, x).prev_sample)
        errors.append([(made[0] - y).abs().max().item() for y in made[1:]])
        x = made[0].clamp(-8, 8)
    # FlowMatchHeun's state is float32 for every sample.
    assert max(exactly for exactly, _ in errors) < (1e-6 if "FlowMatchHeun" in name else 1e-9)
    if name != "IPNDMScheduler":  # whose numbers are exact in diffusers too
        assert max(rounded for _, rounded in errors) > 1e-9


class Float64(torch.overrides.TorchFunctionMode):
    """Wherever diffusers asks for float32, it gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
        if func is torch.ones and "dtype" not in kwargs:
            kwargs["dtype"] = torch.float64
        return func(*map(wide, args), **kwargs)
