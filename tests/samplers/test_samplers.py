"""Samplers as tables: their timesteps, and their steps against the papers' formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffusion_ext as dx
from diffusion_ext import samplers
from diffusion_ext.ops import reference

SCHEDULE = dx.NoiseSchedule.linear(100)


@given(
    timesteps=st.integers(1, 1200),
    share=st.floats(0, 1),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
)
def test_every_step_count_descends_to_clean(timesteps, share, spacing):
    steps = 1 + int(share * (timesteps - 1))
    t = samplers.spaced_timesteps(timesteps, steps, spacing)
    assert t.dtype == np.int64
    assert len(t) == steps
    assert (np.diff(t) < 0).all()
    assert t[-1] >= 1
    assert t[0] <= timesteps
    if spacing != "leading":
        assert t[0] == timesteps


def test_spacings_of_a_divisor():
    assert samplers.spaced_timesteps(100, 5, "trailing").tolist() == [100, 80, 60, 40, 20]
    assert samplers.spaced_timesteps(100, 5, "leading").tolist() == [81, 61, 41, 21, 1]
    assert samplers.spaced_timesteps(100, 5, "linspace").tolist() == [100, 75, 50, 26, 1]
    assert samplers.spaced_timesteps(100, 1, "linspace").tolist() == [100]


def step_of(table, i, x, m, z):
    tensors = table.tensors("cpu", torch.float64)
    return reference.sampler_step(x, m, *tensors, torch.tensor(i), noise=z, clip=table.clip)[0]


def as_prediction(kind, x0, eps, t):
    """What a perfect model of each kind would say of (x0, eps) at t."""
    signal, sigma = SCHEDULE.signal[t], SCHEDULE.sigma[t]
    v = signal * eps - sigma * x0
    return {"epsilon": eps, "v": v, "x0": x0, "flow": eps - x0}[kind]


@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_eq_12_for_every_prediction(prediction, clip, eta):
    table = dx.ddim(SCHEDULE, 7, eta=eta, clip=clip, prediction=prediction)
    x0, eps, z = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    for i, t in enumerate(table.timesteps):
        t_prev = [*table.timesteps, 0][i + 1]
        ab, ab_prev = SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t_prev]
        x = ab**0.5 * x0 + (1 - ab) ** 0.5 * eps
        sigma = eta * ((1 - ab_prev) / (1 - ab)) ** 0.5 * (1 - ab / ab_prev) ** 0.5
        seen = x0 if clip is None else x0.clamp(-clip, clip)
        left = (x - ab**0.5 * seen) / (1 - ab) ** 0.5
        expected = ab_prev**0.5 * seen + (1 - ab_prev - sigma**2) ** 0.5 * left + sigma * z
        out = step_of(table, i, x, as_prediction(prediction, x0, eps, t), z)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", samplers.PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_is_the_posterior_for_every_prediction(prediction, clip):
    """Ho et al. 2020, eq. 7, with the clipped x0; unclipped it is SPEC's formula in epsilon."""
    table = dx.ddpm(SCHEDULE, clip=clip, prediction=prediction)
    assert table.timesteps.tolist() == list(range(100, 0, -1))
    x0, eps, z = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    for i in (0, 50, 97):
        t = table.timesteps[i]
        ab, ab_prev, beta = SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t - 1], SCHEDULE.beta[t]
        x = ab**0.5 * x0 + (1 - ab) ** 0.5 * eps
        if clip is None:
            mean = (x - beta / (1 - ab) ** 0.5 * eps) / (1 - beta) ** 0.5
        else:
            seen = x0.clamp(-clip, clip)
            mean = ab_prev**0.5 * beta * seen + (1 - beta) ** 0.5 * (1 - ab_prev) * x
            mean = mean / (1 - ab)
        out = step_of(table, i, x, as_prediction(prediction, x0, eps, t), z)
        torch.testing.assert_close(out, mean + beta**0.5 * z, rtol=0, atol=1e-12)


def test_noise_only_where_the_paper_has_it():
    az = samplers.COLUMNS.index("az")
    assert (dx.ddpm(SCHEDULE).weights[:-1, az] > 0).all()
    assert dx.ddpm(SCHEDULE).weights[-1, az] == 0
    assert (dx.ddim(SCHEDULE, 10).weights[:, az] == 0).all()
    assert dx.ddim(SCHEDULE, 10, eta=1.0).weights[-1, az] == 0


def test_coefficients_are_float32_of_float64():
    table = dx.ddpm(dx.NoiseSchedule.scaled_linear(1000))
    assert table.weights.dtype == np.float64
    assert table.coefficients.dtype == np.float32
    noise = table.tensors("cpu", torch.bfloat16)[0][-10:-1, samplers.COLUMNS.index("az")]
    assert (noise > 0.02).all()  # half-precision tables would lose the last steps' noise


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_samples(prediction):
    schedule = dx.NoiseSchedule.scaled_linear(50).zero_terminal_snr()
    for table in (
        dx.ddpm(schedule, prediction=prediction),
        dx.ddim(schedule, 10, eta=1.0, prediction=prediction),
    ):
        assert np.isfinite(table.weights).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dx.ddim(SCHEDULE, 0), ValueError, "steps: wanted from 1 to 100 .* got 0"),
        (lambda: dx.ddim(SCHEDULE, 101), ValueError, "steps: wanted from 1 to 100 .* got 101"),
        (lambda: dx.ddim(SCHEDULE, 2.0), TypeError, "steps: wanted an int, got float"),
        (lambda: dx.ddim(SCHEDULE, eta=1.5), ValueError, "eta: wanted a number from 0 to 1"),
        (lambda: dx.ddim(SCHEDULE, eta="a"), TypeError, "eta: wanted a number, got str"),
        (lambda: dx.ddim(SCHEDULE, clip="a"), TypeError, "clip: wanted a number, got str"),
        (lambda: dx.ddim("linear"), TypeError, "schedule: wanted a NoiseSchedule"),
        (lambda: dx.ddim(SCHEDULE, spacing="even"), ValueError, "spacing: wanted one of"),
        (lambda: dx.ddim(SCHEDULE, clip=0), ValueError, "clip: wanted a number above 0"),
        (lambda: dx.ddpm(SCHEDULE, prediction="eps"), ValueError, "prediction: wanted one of"),
        (
            lambda: dx.ddpm(dx.NoiseSchedule.linear(9).zero_terminal_snr()),
            ValueError,
            "prediction: 'epsilon' cannot give x0 at t = 9",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
