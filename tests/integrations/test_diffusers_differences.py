"""Where our schedulers differ from diffusers' on purpose: what it does (shown), and what we do."""

import numpy as np
import pytest
import torch

theirs = pytest.importorskip("diffusers")
import diffusion_ext as dx  # noqa: E402
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

# diffusers makes numpy warn, torchsde warns of what is shown here.
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("DDPMScheduler", "DDIMScheduler")
SHAPE = (2, 3, 6, 5)


def pair(name, **config):
    return [getattr(library, name)(**config) for library in (theirs, ours)]


def noise(*shape, dtype=torch.float32):
    return torch.randn(*(shape or SHAPE)).to(dtype)


@pytest.mark.parametrize("name", [*NAMES, "PNDMScheduler", "LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_noise(name, dtype):
    them, us = pair(name, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    x, z = torch.zeros(10, 1, 8, 8, dtype=dtype), torch.ones(10, 1, 8, 8, dtype=dtype)
    t = torch.arange(10)
    exact = them.add_noise(x.float(), z.float(), t)
    lost = them.add_noise(x, z, t)[:, 0, 0, 0] == 0
    assert lost.sum() == {torch.bfloat16: 10, torch.float16: 2}[dtype]
    torch.testing.assert_close(us.add_noise(x, z, t).float(), exact, atol=0, rtol=2**-8)
    if name != "PNDMScheduler":  # diffusers' has none
        velocity = us.get_velocity(z, x, t).float()
        torch.testing.assert_close(velocity, -exact, atol=0, rtol=2**-8)
    # Also where diffusers has to broadcast.
    wide = us.add_noise(x[:1], z, t)
    torch.testing.assert_close(wide.float(), exact, atol=0, rtol=2**-8)


@pytest.mark.parametrize("name", NAMES)
def test_no_x0_without_signal(name):
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    them, us = pair(name, **config, clip_sample=False)
    them.set_timesteps(10), us.set_timesteps(10)
    m, x = noise(), noise()
    assert not them.step(m, them.timesteps[0], x).prev_sample.isfinite().any()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        us.step(m, us.timesteps[0], x)
    torch.testing.assert_close(  # image to image starts later
        us.step(m, us.timesteps[1], x)[1], them.step(m, us.timesteps[1], x)[1], atol=1e-3, rtol=1e-4
    )
    them, us = pair(name, **config, thresholding=True)
    them.set_timesteps(10), us.set_timesteps(10)
    assert them.step(m, them.timesteps[0], x).prev_sample.isnan().all()
    with pytest.raises(ValueError, match="zero terminal SNR"):
        us.step(m, us.timesteps[0], x)
    them, us = pair(name, **config, clip_sample=True)  # where it is a number, it is ours too
    them.set_timesteps(10), us.set_timesteps(10)
    want, got = (
        s.step(m, us.timesteps[0], x, generator=torch.Generator().manual_seed(1)).prev_sample
        for s in (them, us)
    )
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_last_of_the_noise_is_not_nan():
    them, us = pair(
        "DDIMScheduler",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    right = ours.DDIMScheduler.from_config(us.config, exact_coefficients=True)
    m, x, z = noise(), noise(), noise()
    # √(1 - ᾱ_{t-1} - σ²) is 0 at ᾱ_t = 0, eta = 1. In float32 it is 0, 3e-4 or NaN, which depends
    # on the number of steps and on the processor.
    for steps in range(1, 40):
        for scheduler in (them, us, right):
            scheduler.set_timesteps(steps)
        default, result, other = (
            s.step(m, them.timesteps[0], x, eta=1.0, variance_noise=z).prev_sample
            for s in (us, right, them)
        )
        previous = 999 - 1000 // steps
        signal = (us.alphas_cumprod[previous] if previous >= 0 else us.final_alpha_cumprod).double()
        x0 = -m.double().clamp(-1, 1)
        exact = signal**0.5 * x0 + (1 - signal) ** 0.5 * z.double()
        torch.testing.assert_close(result.double(), exact, atol=2e-5, rtol=0)
        assert torch.allclose(default, result, atol=2e-3)  # diffusers' 3e-4, but never its NaN
        assert other.isnan().all() or torch.allclose(other, default, atol=1e-5)
    spoilt = them.step(m, 600, x, eta=1.7).prev_sample
    assert torch.equal(us.step(m, 600, x, eta=1.7).prev_sample.isnan(), spoilt.isnan())


def test_fixed_large_log():
    m, x = noise(), noise()
    them, us = pair("DDPMScheduler", variance_type="fixed_large_log")
    large = theirs.DDPMScheduler(variance_type="fixed_large")
    results = []
    for scheduler in (them, large, us):
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(3)
        results.append(scheduler.step(m, 500, x, generator=generator).prev_sample)
    assert results[0].isnan().all()  # the root of a logarithm
    torch.testing.assert_close(results[2], results[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_trailing_ends_where_it_should(name):
    them, us = pair(name, num_train_timesteps=100, timestep_spacing="trailing")
    them.set_timesteps(29), us.set_timesteps(29)
    assert them.timesteps[-2:].tolist() == [2, -1]
    assert us.timesteps.tolist() == them.timesteps[:-1].tolist()
    for scheduler in pair(name, num_train_timesteps=100):
        scheduler.set_timesteps(20)
    with pytest.raises(IndexError):  # diffusers counts from the end
        us.step(noise(), -1, noise())


def test_the_previous_timestep():
    """t - T//n is reproduced, and by the switch corrected: each step leads to the next one's t."""
    config = {"timestep_spacing": "trailing", "clip_sample": False}
    them, us = pair("DDIMScheduler", **config)
    switches = {"exact_previous_timestep": True, "exact_coefficients": True}
    exact = ours.DDIMScheduler.from_config(us.config, **switches)
    x0, z = noise().double(), noise().double()
    for steps in (30, 50):
        missed = 0.0
        for scheduler in (them, us, exact):
            scheduler.set_timesteps(steps)
        for i, t in enumerate(us.timesteps[:-1]):
            # A perfect model: each step leaves x0 and z mixed as the timestep it led to has them.
            x = exact.add_noise(x0, z, t)
            after = exact.add_noise(x0, z, exact.timesteps[i + 1])
            want, default, right = (s.step(z, t, x).prev_sample for s in (them, us, exact))
            torch.testing.assert_close(default, want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(right, after, atol=1e-9, rtol=1e-9)
            missed = max(missed, float((want - after).abs().max()))
        assert missed < 1e-5 if 1000 % steps == 0 else missed > 1e-3
    with pytest.raises(IndexError):
        exact.step(z, 998, x)


def test_exact_coefficients():
    """1 - ᾱ_t/ᾱ_{t-1} in float32 has lost figures: diffusers' weights of x and x0 miss the mean,
    and ours as far, until they are asked to be exact."""
    them, us = pair("DDPMScheduler", clip_sample=False, prediction_type="sample")
    right = ours.DDPMScheduler.from_config(us.config, exact_coefficients=True)
    x0 = torch.ones(1, 1, 1, 1)
    errors = []
    for scheduler in (them, us, right):
        alpha_bar = them.alphas_cumprod.double().sqrt()
        worst = 0.0
        for t in range(1, 20):
            x, sigma = (alpha_bar[t] * x0).float(), them._get_variance(t).sqrt()
            got = scheduler.step(x0, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            worst = max(worst, float((got - sigma * z - alpha_bar[t - 1]).abs().max()))
        errors.append(worst)
    assert errors[2] < 5e-6
    assert 1e-5 < errors[0] < 2e-4
    assert abs(errors[1] - errors[0]) < 1e-6
    assert ours.DDPMScheduler.from_config(right.config).exact_coefficients


def test_counter_noise_is_that_of_sample():
    """With noise="counter" a whole run is dx.sample's, and a sample's own whatever its batch."""
    betas = np.linspace(1e-3, 0.1, 20, dtype=np.float32)
    schedule = dx.NoiseSchedule.from_betas(betas)
    scheduler = ours.DDPMScheduler(
        20, trained_betas=betas, variance_type="fixed_large", clip_sample=False, noise="counter"
    )

    def model(x, t, c=None):
        return 0.3 * x

    seeds = torch.tensor([5, 9, 11])
    want = dx.sample(model, (3, 2, 4, 4), dx.ddpm(schedule), seeds=seeds, progress=False).images
    x = dx.philox_normal(seeds, (3, 2, 4, 4), step=0)
    for batch, picked in ((seeds, x), (seeds[1:2], x[1:2])):
        scheduler.set_seeds(batch)
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            picked = scheduler.step(model(picked, t), t, picked).prev_sample
        picked_want = want if len(batch) == 3 else want[1:2]
        torch.testing.assert_close(picked, picked_want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_counter_noise_and_its_seeds(variance_type):
    scheduler = ours.DDPMScheduler(noise="counter", variance_type=variance_type)
    scheduler.set_timesteps(10)
    x, m = noise(), noise(2, 6, 6, 5) if variance_type == "learned_range" else noise()

    def step(generator=None):
        return scheduler.step(m, 500, x, generator=generator).prev_sample

    each = [torch.Generator().manual_seed(s) for s in (1, 2)]
    again = [torch.Generator().manual_seed(s) for s in (1, 2)]
    first = step(each)
    assert torch.equal(first, step(again))
    assert not torch.equal(first, step(again))  # a generator moves on
    one = step(torch.Generator().manual_seed(1))
    assert torch.equal(one, step([torch.Generator().manual_seed(1)]))
    torch.manual_seed(4)
    drawn = step()
    torch.manual_seed(4)
    assert torch.equal(drawn, step())
    scheduler.set_seeds(3)
    seeded = step()
    scheduler.set_seeds(torch.tensor([3, 4]))
    assert torch.equal(seeded, step())
    with pytest.raises(TypeError, match="seeds"):
        scheduler.set_seeds("3")
    with pytest.raises(ValueError, match="counter"):
        ours.DDIMScheduler().set_seeds(3)


def test_a_float32_result_of_half_precision_is_rounded():
    them, us = pair("EulerDiscreteScheduler")
    x, m = noise(dtype=torch.bfloat16), noise(dtype=torch.bfloat16)
    made = []
    for scheduler in (them, us):
        scheduler.set_timesteps(5)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        made.append(scheduler.step(m, scheduler.timesteps[0], x).pred_original_sample)
    want, got = made
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, got.bfloat16().float())
    assert not torch.equal(want, want.bfloat16().float())
    torch.testing.assert_close(got, want, atol=0.1, rtol=2**-6)  # σ m is rounded in theirs


def test_noise_of_an_empty_interval():
    """Between two equal σ torchsde's noise is 0/0; its weight is 0."""
    pytest.importorskip("torchsde")
    them, us = pair("DPMSolverSDEScheduler", noise_sampler_seed=0)
    x = noise()
    for scheduler in (them, us):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(3)
        assert scheduler.sigmas[3] == scheduler.sigmas[4]
    t = us.timesteps[3]
    assert them.step(x, t, x).prev_sample.isnan().all()
    torch.testing.assert_close(us.step(x, t, x).prev_sample, x)


def test_gradients_of_ipndm():
    gradients = []
    for scheduler in pair("IPNDMScheduler"):
        scheduler.set_timesteps(4)
        x = noise().requires_grad_()
        scheduler.step(0.5 * x, scheduler.timesteps[0], x).prev_sample.sum().backward()
        gradients.append(x.grad)
    assert not gradients[0].any()
    assert gradients[1].abs().min() > 0.1
