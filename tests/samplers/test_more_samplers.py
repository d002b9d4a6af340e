"""The samplers beyond DDPM and DDIM: against their formulas, and against diffusers' schedulers."""

import numpy as np
import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.samplers import grids

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")

T = 1000
SCHEDULE = dx.NoiseSchedule.scaled_linear(T, 0.00085, 0.012)
STABLE_DIFFUSION = {
    "num_train_timesteps": T,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def draw():
    return torch.randn(2, 3, 4, dtype=torch.float64)


def run(table, x, outputs, noises=None):
    """The samples after each step, given the model's output and the noise of each."""
    tensors, history, after = table.tensors("cpu", torch.float64), torch.zeros_like(x), []
    for i, m in enumerate(outputs):
        z = None if noises is None else noises[i]
        options = {"noise": z, "history": history, "clip": table.clip}
        x, history = reference.sampler_step(x, m, *tensors, torch.tensor(i), **options)
        after.append(x)
    return after


def ratios(grid):
    """sigma/signal of every level [n+1]."""
    return np.append(grid.sigma / grid.signal, grid.next_sigma[-1] / grid.next_signal[-1])


# --- grids ---


@pytest.mark.parametrize("steps", [1, 7, 20, 30])
def test_spacings_are_those_of_their_names(steps):
    """ComfyUI's schedulers and Sabour et al.'s formula, as timesteps from T to 1 or as ratios."""
    beta = pytest.importorskip("scipy.stats").beta

    def timesteps(spacing):
        return grids.spaced(SCHEDULE, steps, spacing).times * T

    i = np.arange(steps)
    assert timesteps("simple").round(9).tolist() == [T - int(k * T / steps) for k in i]
    assert np.allclose(timesteps("normal"), np.linspace(T, 1, steps))
    assert np.allclose(timesteps("sgm_uniform"), np.linspace(T, 1, steps + 1)[:-1])
    # Its timesteps are whole: np.rint, counted from 0.
    whole = np.rint(beta.ppf(1 - i / steps, 0.6, 0.6) * (T - 1)) + 1
    assert np.abs(timesteps("beta") - whole).max() <= 0.5
    high, low = (SCHEDULE.sigma[t] / SCHEDULE.signal[t] for t in (T, 1))
    share = i / max(steps - 1, 1)
    expected = np.tan(share * np.arctan(low) + (1 - share) * np.arctan(high))
    assert np.allclose(ratios(grids.spaced(SCHEDULE, steps, "kl_optimal"))[:-1], expected)
    for spacing in ("normal", "sgm_uniform", "beta"):  # a level lies where its time says
        grid = grids.spaced(SCHEDULE, steps, spacing)
        known = np.log(SCHEDULE.sigma[1:] / SCHEDULE.signal[1:])
        log_r = np.interp(grid.times * T, np.arange(1, T + 1), known)
        assert np.allclose(np.log(grid.sigma / grid.signal), log_r)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_grids_of_the_noise_ratio(spacing, steps):
    grid = grids.spaced(SCHEDULE, steps, spacing)
    r = ratios(grid)
    assert len(grid) == steps
    assert r[-1] == 0
    assert (np.diff(r) < 0).all()
    assert np.isclose(r[0], SCHEDULE.sigma[T] / SCHEDULE.signal[T])
    if steps > 1:
        assert np.isclose(r[-2], SCHEDULE.sigma[1] / SCHEDULE.signal[1])
        assert np.isclose(grid.times[-1], 1 / T)
    even = r[:-1] ** (1 / 7) if spacing == "karras" else np.log(r[:-1])
    assert np.allclose(np.diff(even, 2), 0, atol=1e-9)
    assert np.allclose(grid.signal**2 + grid.sigma**2, 1)
    assert len(set(grid.timesteps)) == steps  # no two steps share their noise


def test_flow_grid_is_shifted():
    assert np.allclose(grids.flow(4).times, [1, 0.75, 0.5, 0.25])
    assert np.allclose(grids.flow(2, shift=3).times, [1, 0.75])
    grid = grids.flow(5, shift=2)
    assert np.allclose(grid.signal + grid.sigma, 1)
    assert grid.next_sigma[-1] == 0


# --- formulas ---


def test_euler_is_a_straight_line_in_the_noise_ratio():
    table, x, eps = dx.euler(SCHEDULE, 6), draw(), [draw() for _ in range(6)]
    r = ratios(grids.spaced(SCHEDULE, 6, "karras"))
    wide = x * np.sqrt(1 + r[0] ** 2)
    for i, after in enumerate(run(table, x, eps)):
        wide = wide + (r[i + 1] - r[i]) * eps[i]
        torch.testing.assert_close(after * np.sqrt(1 + r[i + 1] ** 2), wide, rtol=1e-12, atol=1e-11)


def test_dpmpp_2m_is_exact_where_x0_is_linear_in_lambda_from_step_to_step():
    """A first order step is exact for a constant x0; the extrapolation adds its change."""
    table = dx.dpmpp_2m(SCHEDULE, 8, prediction="x0")
    assert (table.weights[[0, -1], 5] == 0).all()
    assert table.multistep
    assert not dx.euler(SCHEDULE, 8).multistep
    x0, eps = draw(), draw()
    grid = grids.spaced(SCHEDULE, 8, "trailing")
    after = run(table, grid.signal[0] * x0 + grid.sigma[0] * eps, [x0] * 8)
    for i in range(8):
        expected = grid.next_signal[i] * x0 + grid.next_sigma[i] * eps
        torch.testing.assert_close(after[i], expected, rtol=0, atol=1e-12)


def test_inversion_undoes_ddim_for_a_model_that_says_the_same_both_ways():
    eps = [draw() for _ in range(10)]
    x = draw()
    image = run(dx.ddim(SCHEDULE, 10), x, eps)[-1]
    back = run(dx.ddim_inversion(SCHEDULE, 10), image, eps[::-1])[-1]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    assert dx.ddim_inversion(SCHEDULE, 10).timesteps.tolist() == list(range(100, 1001, 100))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_flow_euler_is_a_straight_line_in_t(clip):
    table, x, v = dx.flow_euler(4, shift=2, clip=clip), draw(), draw()
    t, t_next = table.times[1], table.times[2]
    x0 = x - t * v if clip is None else (x - t * v).clamp(-clip, clip)
    expected = x + (t_next - t) * (x - x0) / t
    out = reference.sampler_step(
        x, v, *table.tensors("cpu", torch.float64), torch.tensor(1), clip=clip
    )[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_sampling_with_history_is_the_same_on_every_backend():
    """The loop carries the data prediction from step to step, in place and by the reference."""
    table = dx.dpmpp_2m(dx.NoiseSchedule.linear(100), 8, clip=1.0)

    def model(x, t, c):
        return torch.tanh(0.7 * x + 0.3 * t[:, None, None, None])

    results = []
    for backend in ("native", "reference"):
        with dx.use_backend(backend):
            results.append(dx.sample(model, (2, 3, 5, 5), table, seeds=3).images)
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    x = dx.philox_normal(3, (2, 3, 5, 5)).double()
    tensors, history = table.tensors("cpu", torch.float64), torch.zeros_like(x)
    for i, time in enumerate(table.times):
        m = model(x, torch.full((2,), time, dtype=x.dtype), None)
        x, history = reference.sampler_step(
            x, m, *tensors, torch.tensor(i), history=history, clip=1.0
        )
    torch.testing.assert_close(results[0].double(), x, rtol=0, atol=1e-5)


# --- diffusers ---


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


def theirs(scheduler, x, outputs, **options):
    after = []
    for t, m in zip(scheduler.timesteps, outputs, strict=True):
        x = scheduler.step(m, t, x, **options).prev_sample
        after.append(x)
    return after


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential"])
def test_dpmpp_2m_is_theirs(diffusers, steps, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION,
        timestep_spacing="trailing",
        use_karras_sigmas=spacing == "karras",
        use_exponential_sigmas=spacing == "exponential",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    x, eps = draw(), [draw() for _ in range(steps)]
    ours = run(dx.dpmpp_2m(SCHEDULE, steps, spacing), x, eps)
    for a, b in zip(ours, theirs(scheduler, x, eps), strict=True):
        torch.testing.assert_close(a, b.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize("spacing", ["trailing", "karras", "exponential"])
def test_euler_is_theirs(diffusers, ancestral, spacing):
    """Theirs runs on x/signal; its ancestral scheduler has no grids in the noise ratio."""
    # "linspace" ends at t = 1, from where its grids in the noise ratio take their least one.
    options = {"timestep_spacing": "trailing" if spacing == "trailing" else "linspace"}
    if ancestral:
        if spacing != "trailing":
            pytest.skip("not in diffusers")
        scheduler = diffusers.EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION, **options)
    else:
        options |= {f"use_{name}_sigmas": spacing == name for name in ("karras", "exponential")}
        scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, **options)
    steps = 10
    scheduler.set_timesteps(steps)
    make = dx.euler_ancestral if ancestral else dx.euler
    r = ratios(grids.spaced(SCHEDULE, steps, spacing))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), r, rtol=1e-4)
    table = make(SCHEDULE, steps, spacing)
    np.testing.assert_allclose(scheduler.timesteps.numpy() + 1, table.times * T, rtol=2e-3)
    x, eps = draw(), [draw() for _ in range(steps)]
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(steps)]
    after = theirs(
        scheduler, x * np.sqrt(1 + r[0] ** 2), eps, generator=torch.Generator().manual_seed(0)
    )
    for i, ours in enumerate(run(table, x, eps, noises)):
        wide = ours * np.sqrt(1 + r[i + 1] ** 2)
        torch.testing.assert_close(wide, after[i].double(), rtol=1e-3, atol=1e-3)


def test_inversion_is_theirs(diffusers):
    scheduler = diffusers.DDIMInverseScheduler(
        **STABLE_DIFFUSION, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(10)
    table, image, eps = dx.ddim_inversion(SCHEDULE, 10), draw(), [draw() for _ in range(10)]
    assert (scheduler.timesteps.numpy() + 1).tolist() == table.timesteps.tolist()
    ours = run(table, image, eps)
    for a, b in zip(ours, theirs(scheduler, image, eps), strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_theirs(diffusers, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    table, x, v = dx.flow_euler(10, shift), draw(), [draw() for _ in range(10)]
    np.testing.assert_allclose(scheduler.timesteps.numpy() / 1000, table.times, rtol=1e-5)
    for a, b in zip(run(table, x, v), theirs(scheduler, x, v), strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-4, atol=1e-4)


BAD = [
    (lambda: dx.dpmpp_2m(SCHEDULE, 0), ValueError, "steps: wanted from 1 to 1000"),
    (lambda: dx.dpmpp_2m("linear"), TypeError, "schedule: wanted a NoiseSchedule"),
    (lambda: dx.euler(SCHEDULE, 5, spacing="even"), ValueError, "spacing: wanted one of"),
    (lambda: dx.flow_euler(0), ValueError, "steps: wanted at least 1, got 0"),
    (lambda: dx.flow_euler(4.0), TypeError, "steps: wanted an int, got float"),
    (lambda: dx.flow_euler(4, shift=0), ValueError, "shift: wanted a number above 0, got 0"),
    (
        lambda: dx.ddim_inversion(SCHEDULE, 5, prediction="x0"),
        ValueError,
        "prediction: wanted 'epsilon', 'v'",
    ),
    (
        lambda: dx.euler(SCHEDULE.zero_terminal_snr(), 5, prediction="v"),
        ValueError,
        "spacing: 'karras' is a grid in sigma/signal, which is infinite at T",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
