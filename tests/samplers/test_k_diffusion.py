"""The samplers and k-diffusion's functions of the same names: the same samples, step by step."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from counterparts import SCHEDULE, denoised, draw, k_diffusion, noise, ratios, run

import diffusion_ext as dx

STEPS = 6
# Our sampler, its options; k-diffusion's function and options.
SAMPLERS = {
    "euler": (dx.euler, {}, "sample_euler", {}),
    "euler_ancestral": (dx.euler_ancestral, {}, "sample_euler_ancestral", {}),
    "euler_ancestral, eta": (
        dx.euler_ancestral, {"eta": 0.6, "s_noise": 1.1},
        "sample_euler_ancestral", {"eta": 0.6, "s_noise": 1.1},
    ),
    "heun": (dx.heun, {}, "sample_heun", {}),
    "dpm2": (dx.dpm2, {}, "sample_dpm_2", {}),
    "dpm2_ancestral": (dx.dpm2_ancestral, {}, "sample_dpm_2_ancestral", {}),
    "dpm2_ancestral, eta": (
        dx.dpm2_ancestral, {"eta": 0.5, "s_noise": 0.9},
        "sample_dpm_2_ancestral", {"eta": 0.5, "s_noise": 0.9},
    ),
    "dpmpp_2s_ancestral": (dx.dpmpp_2s_ancestral, {}, "sample_dpmpp_2s_ancestral", {}),
    "dpmpp_2s_ancestral, eta": (
        dx.dpmpp_2s_ancestral, {"eta": 0.5, "s_noise": 0.9},
        "sample_dpmpp_2s_ancestral", {"eta": 0.5, "s_noise": 0.9},
    ),
    "dpmpp_sde": (dx.dpmpp_sde, {}, "sample_dpmpp_sde", {}),
    "dpmpp_sde, r": (
        dx.dpmpp_sde, {"r": 0.7, "eta": 0.4}, "sample_dpmpp_sde", {"r": 0.7, "eta": 0.4}
    ),
    "dpmpp_2m": (dx.dpmpp_2m, {}, "sample_dpmpp_2m", {}),
    "dpmpp_2m_sde": (dx.dpmpp_2m_sde, {}, "sample_dpmpp_2m_sde", {}),
    "dpmpp_2m_sde, heun": (
        dx.dpmpp_2m_sde, {"solver": "heun", "eta": 0.7, "s_noise": 1.2},
        "sample_dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.7, "s_noise": 1.2},
    ),
    "dpmpp_2m_sde, eta 0": (dx.dpmpp_2m_sde, {"eta": 0.0}, "sample_dpmpp_2m_sde", {"eta": 0.0}),
    "dpmpp_3m_sde": (dx.dpmpp_3m_sde, {}, "sample_dpmpp_3m_sde", {}),
    "dpmpp_3m_sde, eta": (
        dx.dpmpp_3m_sde, {"eta": 0.3, "s_noise": 1.2},
        "sample_dpmpp_3m_sde", {"eta": 0.3, "s_noise": 1.2},
    ),
    **{f"lms {k}": (dx.lms, {"order": k}, "sample_lms", {"order": k}) for k in (1, 2, 3, 4)},
}  # fmt: skip


def theirs(name: str, y, sigmas, options: dict, noises) -> list:
    """The samples at the start of each step of k-diffusion's function, and the last one."""
    function, starts = getattr(k_diffusion(), name), []
    if "noise_sampler" in inspect.signature(function).parameters:
        options = options | {"noise_sampler": lambda *_: next(noises)}
    final = function(
        lambda x, sigma: denoised(x, sigma[0].item()), y, sigmas, disable=True,
        callback=lambda state: starts.append(state["x"].clone()), **options,
    )  # fmt: skip
    return [*starts, final]


def starts_of_steps(table, samples):
    """Those of n + 1 samples that a step begins with: every other, where a step has two rows."""
    two = len(table) > STEPS
    return [*samples[:-1:2], samples[-1]] if two else samples


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_samples(name, spacing):
    ours, options, function, their_options = SAMPLERS[name]
    table = ours(SCHEDULE, STEPS, spacing, prediction="x0", **options)
    sigmas = ratios(table)
    sigmas = sigmas if len(table) == STEPS else torch.cat([sigmas[:-1:2], sigmas[-1:]])
    y = draw(0) * sigmas[0]
    noises = (noise(i) for i in range(len(table)) if table.noisy[i])
    expected = theirs(function, y, sigmas, their_options, noises)
    actual = starts_of_steps(table, run(table, y))
    assert len(actual) == len(expected) == STEPS + 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert next(noises, None) is None  # none of ours was left out there


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2"])
def test_the_same_samples_with_churn(name, monkeypatch):
    """Their noise before a step is ours after the one before; the first is part of the start."""
    ours, _, function, _ = SAMPLERS[name]
    churn = {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.05}
    table = ours(SCHEDULE, STEPS, "karras", prediction="x0", **churn)
    plain = ours(SCHEDULE, STEPS, "karras", prediction="x0")
    sigmas = ratios(plain)
    rows = 1 if len(table) == STEPS else 2
    sigmas = sigmas if rows == 1 else torch.cat([sigmas[:-1:2], sigmas[-1:]])
    churned = [(0.1 <= s <= 9.0) for s in sigmas[:-1].tolist()]
    assert sum(churned) in range(2, STEPS)
    assert churned[0] is False
    assert table.noisy.sum() == sum(churned)
    # Step i's noise is that of the last row of the step before.
    noises = itertools.chain([draw(5)], (noise(rows * i - 1) for i in range(1, STEPS)))
    monkeypatch.setattr(k_diffusion().torch, "randn_like", lambda x: next(noises))
    y = draw(0) * sigmas[0]
    expected = theirs(function, y, sigmas, churn, None)
    actual = starts_of_steps(table, run(table, y))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_churn_of_the_first_step_is_part_of_the_start():
    table = dx.euler(SCHEDULE, 10, s_churn=2.0)
    plain = dx.euler(SCHEDULE, 10)
    torch.testing.assert_close(ratios(table)[0], 1.2 * ratios(plain)[0])
    assert abs((table.levels**2).sum(axis=1) - 1).max() < 1e-12
