"""integrations.k_diffusion in k-diffusion's place: the same call, the same samples."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

import diffusion_ext.integrations.k_diffusion as K

sys.path.append(str(Path(__file__).resolve().parents[1] / "samplers"))
from counterparts import denoised, draw, k_diffusion

# torchsde's, of levels in float32, whoever asks for its motion.
pytestmark = pytest.mark.filterwarnings("ignore:Should have")

FUNCTIONS = [name for name in K.__all__ if name.startswith("sample_")]
OPTIONS = {
    "sample_euler": {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 8.0, "s_noise": 1.02},
    "sample_heun": {"s_churn": 3.0, "s_tmin": 0.5, "s_noise": 1.02},
    "sample_dpm_2": {"s_churn": 1.0},
    "sample_lms": {"order": 2},
    "sample_dpmpp_sde": {"eta": 0.6, "s_noise": 1.1, "r": 0.4},
    "sample_dpmpp_2m_sde": {"eta": 0.6, "solver_type": "heun"},
    "sample_dpmpp_3m_sde": {"eta": 0.6, "s_noise": 1.1},
    "sample_dpm_2_ancestral": {"eta": 0.6, "s_noise": 1.1},
    "sample_euler_ancestral": {"eta": 0.6, "s_noise": 1.1},
    "sample_dpmpp_2s_ancestral": {"eta": 0.6, "s_noise": 1.1},
}
SIGMAS = {
    "to 0": [14.6, 7.0, 3.0, 1.2, 0.5, 0.1, 0.0],
    "to a level above 0": [14.6, 7.0, 3.0, 1.2],
    "one step": [14.6, 0.0],
    "no step": [3.0],
}


def model(x, sigma, shift):
    assert sigma.shape == x.shape[:1]
    return denoised(x, sigma[0].item()) + shift


def called(module, name, sigmas, dtype, **options):
    """(the result, the callback's dictionaries) of a call, from one state of torch's generator."""
    torch.manual_seed(5)
    sigmas = torch.tensor(SIGMAS[sigmas], dtype=dtype)
    x, states = (draw(0) * sigmas[0]).to(dtype), []
    before = x.clone()
    out = getattr(module, name)(
        model, x, sigmas, extra_args={"shift": 0.1}, callback=states.append, disable=True, **options
    )
    assert torch.equal(x, before)
    return out, states


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_arguments(name):
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (K, k_diffusion()))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("options", ["their defaults", "others"])
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_samples(name, dtype, sigmas, options):
    """Of the noise that both draw from torch's generator, Brownian motion included."""
    options = OPTIONS.get(name, {}) if options == "others" else {}
    ours, our_states = called(K, name, sigmas, dtype, **options)
    assert ours.dtype == dtype
    if sigmas == "one step" and name in ("sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"):
        with pytest.raises(UnboundLocalError):  # theirs wants a second step
            called(k_diffusion(), name, sigmas, dtype, **options)
        assert torch.equal(ours, our_states[0]["denoised"])
        return
    theirs, their_states = called(k_diffusion(), name, sigmas, dtype, **options)
    # In float32 they have the levels in float32 too, and in sample_dpmpp_sde ask for the motion up
    # to a middle rounded so: √ of a rounding apart.
    single = 2e-2 if name == "sample_dpmpp_sde" else 2e-4
    close = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else single}
    torch.testing.assert_close(ours, theirs, **close)
    assert len(our_states) == len(their_states)
    for a, b in zip(our_states, their_states, strict=True):
        assert a.keys() == b.keys()
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(a[key], b[key], **close)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "sde" in n or "ancestral" in n])
def test_a_noise_sampler_of_ones_own(name):
    asked = {}

    def noises(module):
        def noise(sigma, sigma_next):
            asked.setdefault(module, []).append((float(sigma), float(sigma_next)))
            return draw(len(asked[module]))

        return noise

    ours, theirs = (
        called(m, name, "to 0", torch.float64, noise_sampler=noises(m))[0]
        for m in (K, k_diffusion())
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert torch.allclose(torch.tensor(asked[K]), torch.tensor(asked[k_diffusion()]))


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if "sde" in n or "ancestral" in n])
def test_noise_of_the_kernel(name):
    first, again = (
        called(K, name, "to 0", torch.float32, noise_sampler="counter")[0] for _ in "ab"
    )
    assert torch.equal(first, again)
    assert first.isfinite().all()
    plain = called(K, name, "to 0", torch.float32)[0]
    assert not torch.equal(first, plain)


def test_half_precision():
    ours, _ = called(K, "sample_dpmpp_2m", "to 0", torch.bfloat16)
    exact, _ = called(K, "sample_dpmpp_2m", "to 0", torch.float64)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=0.05)


def test_the_rest_is_k_diffusions():
    assert K.sampling is K
    assert K.sampling.get_sigmas_karras is k_diffusion().get_sigmas_karras
    assert K.utils.append_dims is sys.modules["k_diffusion.utils"].append_dims
    with pytest.raises(AttributeError, match="has no 'sample_nothing'"):
        K.sample_nothing  # noqa: B018


BAD = [
    ({"x": 3}, TypeError, "x: wanted a tensor"),
    ({"sigmas": [1.0, 0.0]}, TypeError, "sigmas: wanted a tensor"),
    ({"sigmas": torch.ones(2, 2)}, TypeError, r"sigmas: wanted a tensor .n\+1., got .* \[2, 2\]"),
    ({"sigmas": torch.tensor([1.0, 0.0, 0.5])}, ValueError, "sigmas: wanted numbers above 0"),
    ({"sigmas": torch.tensor([1.0, -1.0])}, ValueError, "sigmas: wanted numbers above 0"),
    ({"sigmas": torch.tensor([1.0, 2.0, 0.5])}, ValueError, "sigmas: .* wanted them descending"),
    ({"model": lambda x, sigma: x[:1]}, ValueError, "model: wanted an output of shape"),
    ({"noise_sampler": "mine"}, ValueError, "noise_sampler: wanted one of"),
    ({"eta": -1.0}, ValueError, "eta: wanted"),
]


@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(change, error, message):
    arguments = {
        "model": lambda x, sigma: x,
        "x": torch.ones(2, 3),
        "sigmas": torch.tensor([1.0, 0.5]),
    }
    with pytest.raises(error, match=message):
        K.sample_euler_ancestral(**(arguments | {"disable": True} | change))


def test_steps_upwards_without_noise_are_k_diffusions():
    """From an image to its noise ("unsampling"); and two equal levels, which is no step at all."""
    sigmas, x = torch.tensor([0.1, 0.5, 2.0, 8.0], dtype=torch.float64), draw(0)
    for name in ("sample_euler", "sample_dpmpp_2m"):
        ours, theirs = (
            getattr(m, name)(lambda x, s: denoised(x, s[0].item()), x, sigmas, disable=True)
            for m in (K, k_diffusion())
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    level = torch.tensor([2.0, 2.0, 0.5])
    with pytest.raises(ValueError, match=r"sigmas: .* wanted them descending"):
        K.sample_dpmpp_2m(lambda x, s: x, x, level, disable=True)
