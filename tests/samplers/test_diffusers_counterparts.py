"""The samplers and diffusers' schedulers: the same samples, step by step, in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from counterparts import SCHEDULE, denoised, draw, noise, ratios, run

import diffusion_ext as dx

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

BETAS = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # fmt: skip


class InFloat64:
    """torch, with float64 where a scheduler asks for float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def scheduler(monkeypatch):
    """Makes a scheduler of diffusers that computes in float64, with the noise of our rows."""

    def make(name: str, **options):
        module = importlib.import_module(getattr(diffusers, name).__module__)
        monkeypatch.setattr(module, "torch", InFloat64())
        made = getattr(diffusers, name)(**options)
        made.rows = 0

        def draw_noise(shape, **_):
            return noise(made.rows)

        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", draw_noise)
        return made

    return make


def theirs(
    scheduler, table, y, predict=lambda x, signal, sigma: denoised(x / signal, sigma / signal)
):
    """The samples x/signal [n+1] of a scheduler that stands at a table's levels."""
    x, samples = y * table.levels[0, 0], [y]
    for i, t in enumerate(scheduler.timesteps):
        signal, sigma = table.levels[i].tolist()
        scheduler.rows = i
        x = scheduler.step(predict(x, signal, sigma), t, x).prev_sample
        assert x.dtype == torch.float64
        samples.append(x / table.levels[i + 1, 0])
    return samples


def assert_same(actual, expected, tolerance=1e-9):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


DPM = "DPMSolverMultistepScheduler"
BY_SIGMA = {
    **{
        f"dpmpp_2m {k} {solver}": (
            dx.dpmpp_2m, {"order": k, "solver": solver},
            DPM, {"solver_order": k, "solver_type": solver},
        )
        for k in (1, 2, 3) for solver in ("midpoint", "heun")
    },
    **{
        f"dpmpp_2m_sde {solver}": (
            dx.dpmpp_2m_sde, {"solver": solver}, DPM,
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": solver},
        )
        for solver in ("midpoint", "heun")
    },
    **{
        f"unipc {k} {b}": (
            dx.unipc, {"order": k, "variant": b},
            "UniPCMultistepScheduler", {"solver_order": k, "solver_type": b},
        )
        for k in (1, 2, 3) for b in ("bh1", "bh2")
    },
    "unip": (
        dx.unipc, {"order": 3, "corrector": False},
        "UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": list(range(50))},
    ),
    **{
        f"deis {k}": (dx.deis, {"order": k}, "DEISMultistepScheduler", {"solver_order": k})
        for k in (1, 2, 3)
    },
    **{
        f"sa_solver {p} {c} {tau}": (
            dx.sa_solver, {"order": p, "corrector_order": c, "tau": tau, "interval": (0, 1e9)},
            "SASolverScheduler",
            {"predictor_order": p, "corrector_order": c, "tau_func": lambda t, tau=tau: tau},
        )
        for p in (1, 2, 3) for c in (1, 2, 3) for tau in (0.0, 0.8)
    },
}  # fmt: skip


@pytest.mark.parametrize("steps", [7, 18])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("name", BY_SIGMA)
def test_the_same_samples(name, spacing, steps, scheduler):
    ours, options, their_name, their_options = BY_SIGMA[name]
    table = ours(SCHEDULE, steps, spacing, prediction="x0", **options)
    made = scheduler(their_name, **BETAS, prediction_type="sample", **their_options)
    made.set_timesteps(steps)
    made.timesteps = torch.arange(steps, 0, -1)  # what is looked up is the place alone
    made.sigmas = ratios(table)
    made.sigmas[-1] = 1e-13  # not all of them can land on 0
    y = draw(0) * made.sigmas[0]
    # DEIS of 15 steps and more extrapolates log r over the last one too, to where it is infinite.
    compared = slice(steps if ours is dx.deis and steps >= 15 else None)
    assert_same(run(table, y)[compared], theirs(made, table, y)[compared])


def test_sa_solver_has_its_noise_in_an_interval(scheduler):
    table = dx.sa_solver(SCHEDULE, 10, "trailing", prediction="x0", tau=0.7, interval=(0.2, 3.0))
    sigmas = ratios(table)
    inside = [0.2 <= s <= 3.0 for s in sigmas.tolist()]
    made = scheduler(
        "SASolverScheduler", **BETAS, prediction_type="sample",
        tau_func=lambda t: 0.7 * inside[10 - int(t)],
    )  # fmt: skip
    made.set_timesteps(10)
    made.timesteps, made.sigmas = torch.arange(10, 0, -1), sigmas.clone()
    made.sigmas[-1] = 1e-13
    y = draw(0) * sigmas[0]
    assert_same(run(table, y), theirs(made, table, y))
    assert 2 <= sum(inside) <= 8


def as_epsilon(x, signal, sigma):
    return (x - signal * denoised(x / signal, sigma / signal)) / sigma


def exact(scheduler):
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alpha_bar[1:].copy())
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_plms(scheduler, steps):
    made = exact(scheduler("PNDMScheduler", **BETAS, skip_prk_steps=True, set_alpha_to_one=True))
    made.set_timesteps(steps)
    table = dx.plms(SCHEDULE, steps, prediction="x0")
    assert len(table) == len(made.timesteps)
    y = draw(0) * ratios(table)[0]
    assert_same(run(table, y), theirs(made, table, y, as_epsilon))


def test_ipndm(scheduler):
    """Theirs has levels of its own, which are put in place; its model's output is v."""
    table, made = dx.ipndm(SCHEDULE, 12, prediction="x0"), scheduler("IPNDMScheduler")
    made.set_timesteps(12)
    made.alphas, made.betas = torch.from_numpy(table.levels.copy()).unbind(1)
    y = draw(0) * ratios(table)[0]

    def as_v(x, signal, sigma):
        return signal * as_epsilon(x, signal, sigma) - sigma * denoised(x / signal, sigma / signal)

    assert_same(run(table, y), theirs(made, table, y, as_v))


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 50])
def test_lcm(scheduler, steps):
    made = exact(scheduler("LCMScheduler", **BETAS, prediction_type="sample"))
    made.set_timesteps(steps)
    table = dx.lcm(SCHEDULE, steps, prediction="x0")
    assert (table.timesteps == made.timesteps.numpy() + 1).all()
    y = draw(0) * ratios(table)[0]
    # Their c_out is a product of an int64 tensor and a number, float32 whatever the samples are.
    assert_same(run(table, y), theirs(made, table, y), 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_tcd(scheduler, steps, eta):
    made = exact(scheduler("TCDScheduler", **BETAS, prediction_type="sample"))
    made.set_timesteps(steps)
    table = dx.tcd(SCHEDULE, steps, eta=eta, prediction="x0")
    assert (table.timesteps == made.timesteps.numpy() + 1).all()
    y = draw(0) * ratios(table)[0]
    step = made.step
    made.step = lambda m, t, x: step(m, t, x, eta=eta)
    assert_same(run(table, y), theirs(made, table, y))


@pytest.mark.parametrize("name", ["Euler", "Heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(scheduler, name, shift):
    """At t = 1 there is no x/signal: the samples themselves are compared."""
    ours = {"Euler": dx.flow_euler, "Heun": dx.flow_heun}[name]
    table, made = ours(6, shift), scheduler(f"FlowMatch{name}DiscreteScheduler")
    made.set_timesteps(6)
    t = torch.from_numpy(table.levels[:, 1].copy())
    made.timesteps = torch.arange(len(table), 0, -1, dtype=torch.float64)
    made.sigmas = t if name == "Euler" else torch.cat([t[:1], t[1:]])
    x, tensors, slots = draw(0), table.tensors("cpu", torch.float64), table.new_slots(draw(0))
    z = x
    for i in range(len(table)):
        v = torch.tanh(1.5 * x - t[i]) + 0.3 * x
        w = torch.tanh(1.5 * z - t[i]) + 0.3 * z
        x = dx.sampler_step(x, v, *tensors, torch.tensor(i), slots=slots)
        z = made.step(w, made.timesteps[i], z).prev_sample
        torch.testing.assert_close(x, z, rtol=1e-9, atol=1e-9)
