"""Our schedulers whose steps are traced beside diffusers' own: results, state, errors, noise."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import pickle
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

theirs = pytest.importorskip("diffusers")
from traced_configs import (  # noqa: E402
    NAMES,
    arguments,
    attempt,
    configs,
    extra,
    options,
    state_of,
    tensors_of,
)

import diffusion_ext as dx  # noqa: E402
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
EPS = {torch.float64: 2**-23, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SHAPE = (2, 3, 6, 5)
dtypes = st.sampled_from([torch.float32, torch.float32, torch.float64, *EPS])


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
        x = want.prev_sample.clamp(-8, 8).nan_to_num()


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


CHANGES = {
    "deepcopy": lambda us, i: copy.deepcopy(us) if i % 2 else us,
    "pickle": lambda us, i: pickle.loads(pickle.dumps(us)) if i % 2 else us,
    "copy": lambda us, i: copy.copy(us) if i % 2 else us,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_copies_in_the_middle_of_a_run_go_on(name, change):
    def unpickled(us, i):  # a lambda and a Brownian tree are no pickles, in theirs neither
        return change(us, i) if name not in ("SASolverScheduler", "DPMSolverSDEScheduler") else us

    pair = started(name, {}, lambda s: s.set_timesteps(6))
    same_runs(*pair, torch.float32, change=unpickled)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_own_step_can_take_over_and_give_back(name):
    them, us = started(name, {}, lambda s: s.set_timesteps(6))

    class Mixed:
        """ours, but for every second step."""

        def __init__(self):
            self.count = 0

        def __getattr__(self, attribute):
            return getattr(us, attribute)

        def step(self, *args, **kwargs):
            self.count += 1
            return (type(us).theirs.step if self.count % 3 == 2 else type(us).step)(
                us, *args, **kwargs
            )

    x, mixed = torch.randn(SHAPE), Mixed()
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    for t in us.timesteps:
        scaled(them, x, t), scaled(us, x, t)
        m = torch.randn(SHAPE)
        generators = [{"generator": g} if draws(them) else {} for g in noise]
        want = them.step(m, t, x, **generators[0]).prev_sample
        got = mixed.step(m, t, x, **generators[1]).prev_sample
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        same_state(us, them, torch.float32, 1e3 * largest(x, *tensors_of(state_of(them))))
        x = want.clamp(-8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_was_put_there_is_used(name):
    """diffusers' own tests, and users, write into model_outputs and ets."""
    them, us = started(name, {}, lambda s: s.set_timesteps(10))
    past = [torch.randn(SHAPE) for _ in range(4)]
    for scheduler in (them, us):
        if hasattr(scheduler, "model_outputs"):
            count = len(scheduler.model_outputs)
            scheduler.model_outputs = past[:count]
            if hasattr(scheduler, "lower_order_nums"):
                scheduler.lower_order_nums = count - 1
        if hasattr(scheduler, "ets"):
            scheduler.ets = past[:]
        if hasattr(scheduler, "derivatives"):
            scheduler.derivatives = past[:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(6)
    x, m, t = torch.randn(SHAPE), torch.randn(SHAPE), us.timesteps[6]
    scaled(them, x, t), scaled(us, x, t)
    noise = [torch.Generator().manual_seed(5) for _ in range(2)]
    generators = [{"generator": g} if draws(them) else {} for g in noise]
    for _ in range(2):
        want, refused = attempt(lambda: them.step(m, t, x, **generators[0]).prev_sample)
        got, we_refused = attempt(lambda: us.step(m, t, x, **generators[1]).prev_sample)
        assert type(refused) is type(we_refused)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True)


STARTS = {
    "timesteps": lambda s: s.set_timesteps(timesteps=[900, 500, 400, 100]),
    "sigmas": lambda s: s.set_timesteps(sigmas=[10.0, 3.0, 1.0, 0.2, 0.0]),
    "sigmas and mu": lambda s: s.set_timesteps(sigmas=[1.0, 0.6, 0.2], mu=0.8),
    "a position": lambda s: s.set_timesteps(7),
    "too many": lambda s: s.set_timesteps(7, None, None, None, None, None, None, None, None),
    "a device": lambda s: s.set_timesteps(7, "cpu"),
    "more than there are": lambda s: s.set_timesteps(2000),
    "none": lambda s: s.set_timesteps(None),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", STARTS.values(), ids=list(STARTS))
def test_every_form_of_set_timesteps(name, start):
    pair = started(name, {}, start)
    if pair is not None and len(pair[0].timesteps) < 100:
        same_runs(*pair, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_begin_in_the_middle(name):
    """As image to image does: from a later timestep, by its place or found by its value."""
    for by_place in (True, False):
        them, us = started(name, {}, lambda s: s.set_timesteps(8))
        if not hasattr(them, "index_for_timestep"):
            return
        x = torch.randn(SHAPE)
        noise = [torch.Generator().manual_seed(5) for _ in range(2)]
        for t in us.timesteps[4:]:
            for scheduler in (them, us):
                if by_place and scheduler.begin_index is None:
                    scheduler.set_begin_index(4)
                scaled(scheduler, x, t)
            m = torch.randn(SHAPE)
            generators = [{"generator": g} if draws(them) else {} for g in noise]
            want = them.step(m, t, x, **generators[0]).prev_sample
            got = us.step(m, t, x, **generators[1]).prev_sample
            assert us.step_index == them.step_index
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3, equal_nan=True)
            x = want.clamp(-8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_of_other_steps(name):
    them, us = started(name, {}, lambda s: s.set_timesteps(8))
    for steps in (8, 6, 8):
        them.set_timesteps(steps), us.set_timesteps(steps)
        same_runs(them, us, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_sigmas_that_are_changed_in_the_middle(name):
    """Replaced, or written into."""

    def written(scheduler):
        scheduler.sigmas *= 1.25

    def replaced(scheduler):
        scheduler.sigmas = scheduler.sigmas * 0.5

    for change in (written, replaced):
        them, us = started(name, {}, lambda s: s.set_timesteps(6))
        if not hasattr(them, "sigmas"):
            return
        x = torch.randn(SHAPE)
        noise = [torch.Generator().manual_seed(5) for _ in range(2)]
        for i, t in enumerate(us.timesteps[:4]):
            if i == 2:
                change(them), change(us)
            scaled(them, x, t), scaled(us, x, t)
            generators = [{"generator": g} if draws(them) else {} for g in noise]
            want = them.step(x, t, x, **generators[0]).prev_sample
            got = us.step(x, t, x, **generators[1]).prev_sample
            torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


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


@pytest.mark.parametrize("name", NAMES)
def test_arguments_as_diffusers_has_them(name):
    for method in ("step", "set_timesteps", "scale_model_input"):
        other = getattr(getattr(theirs, name), method, None)
        if other is not None:
            mine = getattr(getattr(ours, name), method)
            assert inspect.signature(mine) == inspect.signature(other)
            assert mine.__doc__ == other.__doc__
    mine, other = (inspect.signature(getattr(lib, name)).parameters for lib in (ours, theirs))
    assert [p for p in mine if p in other] == list(other)
    assert set(mine) - set(other) == {"noise", "exact_coefficients"}


@pytest.mark.parametrize("name", NAMES)
def test_configs_go_both_ways(name, tmp_path):
    them, us = getattr(theirs, name)(), getattr(ours, name)()
    hidden = {"_use_default_values"}
    plain = {k: v for k, v in us.config.items() if k not in hidden}
    assert plain == {k: v for k, v in them.config.items() if k not in hidden}
    assert us.compatibles == them.compatibles
    switched = getattr(ours, name).from_config(them.config, exact_coefficients=True)
    switched.save_pretrained(tmp_path)
    assert getattr(ours, name).from_pretrained(tmp_path).exact_coefficients
    getattr(theirs, name).from_pretrained(tmp_path)
    back = getattr(theirs, name).from_config(us.config)
    assert type(back) is getattr(theirs, name)


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
    """What diffusers computes where its own numbers are float64."""
    them = getattr(theirs, name)(**extra(name))
    exact = getattr(ours, name)(**extra(name), exact_coefficients=True)
    plain = getattr(ours, name)(**extra(name))
    for scheduler in (them, exact, plain):
        scheduler.set_timesteps(7)
    for attribute, value in vars(them).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            setattr(them, attribute, value.double())
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
