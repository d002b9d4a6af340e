"""Noise schedules against their formulas, the oracle and each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import diffusion_ext as dx

Schedule = dx.NoiseSchedule


def test_linear_is_the_oracle(loops):
    schedule = Schedule.linear(int(loops["T"]))
    np.testing.assert_allclose(schedule.beta, loops["beta"], rtol=1e-14)
    np.testing.assert_allclose(schedule.alpha_bar, loops["alpha_bar"], rtol=1e-14)


def test_linear_defaults():
    schedule = Schedule.linear()
    assert schedule.timesteps == 500
    assert schedule.beta[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert schedule.alpha_bar[0] == 1
    assert schedule.alpha_bar[1] == pytest.approx((1 - 1e-4) * (1 - schedule.beta[1]))


def test_course_is_the_notebook_in_float32():
    beta = (0.02 - 1e-4) * torch.linspace(0, 1, 501) + 1e-4
    alpha_bar = torch.cumsum((1 - beta).log(), dim=0).exp()
    alpha_bar[0] = 1
    torch.set_default_dtype(torch.float64)  # the table does not follow torch's defaults
    try:
        schedule = Schedule.course()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.tensor(schedule.alpha_bar).float(), alpha_bar)
    np.testing.assert_allclose(schedule.alpha_bar, Schedule.linear().alpha_bar, rtol=1e-4)


def test_from_betas_multiplies():
    schedule = Schedule.from_betas([0.1, 0.2, 0.5])
    assert schedule.alpha_bar.tolist() == pytest.approx([1, 0.9, 0.72, 0.36])
    assert schedule.beta.tolist() == [0, 0.1, 0.2, 0.5]
    from_tensor = Schedule.from_betas(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64))
    assert from_tensor.alpha_bar.tolist() == schedule.alpha_bar.tolist()


def test_scaled_linear_is_linear_in_the_root():
    root = np.sqrt(Schedule.scaled_linear(1000).beta[1:])
    np.testing.assert_allclose(np.diff(root), (0.012**0.5 - 0.00085**0.5) / 999, rtol=1e-9)
    assert root[[0, -1]] ** 2 == pytest.approx([0.00085, 0.012])


def test_cosine_is_nichol_and_dhariwal():
    schedule = Schedule.cosine(1000)
    t = np.arange(1001) / 1000
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:990], (f / f[0])[:990], rtol=1e-10)
    assert schedule.beta.max() == 0.999


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "course"])
@given(timesteps=st.integers(1, 1500))
def test_every_schedule_decreases_from_one(name, timesteps):
    schedule = getattr(Schedule, name)(timesteps)
    assert schedule.timesteps == timesteps
    assert schedule.alpha_bar[0] == 1
    assert (np.diff(schedule.alpha_bar) < 0).all()
    assert schedule.alpha_bar[-1] > 0
    np.testing.assert_allclose(schedule.signal**2 + schedule.sigma**2, 1, rtol=1e-12)


def test_zero_terminal_snr():
    before = Schedule.scaled_linear(100)
    after = before.zero_terminal_snr()
    assert after.alpha_bar[-1] == 0
    assert after.alpha_bar[0] == 1
    assert after.alpha_bar[1] == pytest.approx(before.alpha_bar[1])
    np.testing.assert_allclose(after.alpha_bar[1:], np.cumprod(1 - after.beta[1:]), atol=1e-15)
    # Lin et al., algorithm 1: an affine map of sqrt(alpha_bar).
    ratio = np.diff(after.signal[1:]) / np.diff(before.signal[1:])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_tables_are_read_only_and_cached():
    schedule = Schedule.linear(10)
    with pytest.raises(ValueError, match="read-only"):
        schedule.alpha_bar[0] = 2
    weights = dx.ddim(schedule, 2).weights
    with pytest.raises(ValueError, match="read-only"):
        weights[0] = 2
    device = torch.device("cpu")
    assert schedule.tensor("signal", device) is schedule.tensor("signal", device)
    assert schedule.tensor("sigma", device, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Schedule.linear(0), ValueError, "timesteps: wanted at least 1, got 0"),
        (lambda: Schedule.linear(2.5), TypeError, "timesteps: wanted an int, got float"),
        (lambda: Schedule.linear(5, 0.3, 0.2), ValueError, "beta_start, beta_end: wanted 0 <"),
        (lambda: Schedule.scaled_linear(5, -1, 0.2), ValueError, "beta_start, beta_end"),
        (lambda: Schedule.cosine(-1), ValueError, "timesteps: wanted at least 1, got -1"),
        (lambda: Schedule.from_betas([]), ValueError, r"betas: wanted shape \[T\]"),
        (lambda: Schedule.from_betas([[0.1]]), ValueError, r"betas: .* got shape \[1, 1\]"),
        (lambda: Schedule.from_betas([0.1, 1.5]), ValueError, r"betas: wanted values in \(0, 1\]"),
        (lambda: Schedule.from_betas([0.1, 1, 0.1]), ValueError, "betas: wanted 1 at most as"),
        (lambda: Schedule.from_betas([0.1, float("nan")]), ValueError, "betas: wanted values"),
        (lambda: Schedule.from_betas("abc"), TypeError, "betas: wanted numbers"),
        (lambda: Schedule.linear(1).zero_terminal_snr(), ValueError, "zero_terminal_snr"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
