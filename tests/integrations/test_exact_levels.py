"""exact_coefficients=True is finite and right where diffusers' float32 makes a difference NaN."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

theirs = pytest.importorskip("diffusers")

from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

ANCESTRAL = ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "linspace", "trailing")
SIGMAS = ("", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
STEPS = (1, 2, 3, 4, 5, 8, 10, 13)


def start(scheduler, steps: int):
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def drawn(i: int) -> torch.Tensor:
    """The noise that a step draws from generator i."""
    generator = torch.Generator().manual_seed(i)
    return torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)


def calls(name: str, scheduler) -> list[tuple]:
    """(σ of the call, σ that is stepped down to, σ of the noise, σ the step began at), from the
    formulas in float64: σ_down² = σ'² - σ_up², σ_up² = σ'² (σ² - σ'²)/σ², and for DPM2 a middle
    that is even in log σ."""
    two = name.startswith("KDPM2")
    sigmas = scheduler.sigmas.double()
    sigmas = torch.cat([sigmas[:1], sigmas[1:-1:2]]) if two else sigmas
    made = []
    for start, end in itertools.pairwise(sigmas.tolist()):
        down, up = end * (end / start), end * ((1 - end / start) * (1 + end / start)) ** 0.5
        if two and end > 0:
            middle = (start * down) ** 0.5
            made += [(start, middle, 0.0, start), (middle, down, up, start)]
        else:
            made.append((start, down, up, start))
    return made


def assert_as_the_formulas_have_it(name: str, scheduler) -> None:
    """Step by step, for a model whose data predictions are drawn."""
    x, begun = drawn(1000) * float(scheduler.init_noise_sigma), None
    wanted = calls(name, scheduler)
    assert len(wanted) == len(scheduler.timesteps)
    for i, (t, (sigma, down, up, start)) in enumerate(
        zip(scheduler.timesteps, wanted, strict=True)
    ):
        m = (x - drawn(2000 + i)) / sigma
        begun = x if sigma == start else begun
        want = begun + (down - start) * m + up * drawn(i)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        # The levels are rounded once to float32; what is added up is as large as start * m.
        most = 2**-23 * (down * m.abs() + up * drawn(i).abs()) + 2**-46 * start * m.abs()
        assert ((x - want).abs() <= most).all()


@pytest.mark.parametrize("name", ANCESTRAL)
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_steps_down_however_far(name, betas, spacing):
    for sigmas in SIGMAS if name.startswith("KDPM2") else SIGMAS[:1]:
        config = {"beta_schedule": betas, "timestep_spacing": spacing}
        config |= {sigmas: True} if sigmas else {}
        scheduler = getattr(ours, name)(**config, exact_coefficients=True)
        for steps in STEPS:
            assert_as_the_formulas_have_it(name, start(scheduler, steps))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_in_the_middle(betas, spacing):
    config = {"beta_schedule": betas, "timestep_spacing": spacing}
    exact = getattr(ours, ANCESTRAL[1])(**config, exact_coefficients=True)
    diffusers_own = getattr(theirs, ANCESTRAL[1])(**config)
    for steps in (1, 2, 4, 10):
        scheduler, own = start(exact, steps), start(diffusers_own, steps)
        middles = [call[0] for call in calls(ANCESTRAL[1], scheduler)[1::2]]
        log_sigmas = scheduler.log_sigmas.double().numpy()
        want = np.interp(np.log(middles), log_sigmas, np.arange(1000)) if middles else []
        np.testing.assert_allclose(scheduler.timesteps[1::2].numpy(), want, rtol=0, atol=1e-3)
        assert torch.equal(scheduler.timesteps[::2], own.timesteps[::2])
        for attribute in ("timesteps", "sigmas_up", "sigmas_down", "sigmas_interpol"):
            got, other = getattr(scheduler, attribute), getattr(own, attribute)
            assert (got.shape, got.dtype) == (other.shape, other.dtype)
            assert got.isfinite().all()


@pytest.mark.parametrize("name", ANCESTRAL)
def test_diffusers_own_is_not_finite_there(name):
    """And ours the same, without exact_coefficients, to the timesteps that the model is given."""
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"}
    pair = [start(getattr(library, name)(**config), 4) for library in (theirs, ours)]
    torch.testing.assert_close(*(s.timesteps for s in pair), rtol=0, atol=0, equal_nan=True)
    for scheduler in pair:
        x, t = drawn(0), scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        assert scheduler.step(x, t, x, generator=torch.Generator()).prev_sample.isnan().all()


EQUAL_TIMESTEPS = {
    "DEISMultistepScheduler": IndexError,
    "DPMSolverMultistepScheduler": IndexError,
    "DPMSolverSinglestepScheduler": IndexError,
    "SASolverScheduler": AssertionError,
    "UniPCMultistepScheduler": AssertionError,
}


@pytest.mark.parametrize("name", EQUAL_TIMESTEPS)
def test_of_two_equal_timesteps_the_second_begins(name):
    """As in diffusers, whose run then has a step too few; set_begin_index says where it begins."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    for library, begin in itertools.product((theirs, ours), (None, 0)):
        scheduler = getattr(library, name)(**config)
        scheduler.set_timesteps(8)
        assert scheduler.timesteps[0] == scheduler.timesteps[1]
        if begin is not None:
            scheduler.set_begin_index(begin)
        if begin is None:
            with pytest.raises(EQUAL_TIMESTEPS[name]):
                last_sample(scheduler)
        else:
            assert last_sample(scheduler).isfinite().all()


def last_sample(scheduler) -> torch.Tensor:
    x = torch.ones(1, 1, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    return x
