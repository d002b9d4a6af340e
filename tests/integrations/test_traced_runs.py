"""Runs of the traced schedulers that are started, copied, stopped and changed, as users do."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

theirs = pytest.importorskip("diffusers")
from beside_diffusers import (  # noqa: E402
    NAMES,
    SHAPE,
    attempt,
    draws,
    largest,
    same_runs,
    same_state,
    scaled,
    started,
    state_of,
    tensors_of,
)

from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


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
