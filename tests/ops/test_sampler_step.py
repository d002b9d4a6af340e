"""sampler_step: the kernel against the float64 reference, in place and not."""

import itertools

import pytest
import torch
from harness import DTYPES, KERNELS, LAYOUTS, SHAPES, assert_close, lay, same_bits

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels

SCHEDULE = dx.NoiseSchedule.linear(100)
ROWS = [1, 4, 9]


def table_for(clip):
    return dx.ddim(SCHEDULE, 10, eta=0.7, clip=clip)


def reference_step(table, x, m, row, **options):
    options = {k: v.double() if k in ("noise", "history") else v for k, v in options.items()}
    tensors = table.tensors(x.device, torch.float64)
    return reference.sampler_step(x.double(), m.double(), *tensors, row, clip=table.clip, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(dtype, shape, layout):
    x, m, m2 = (lay(torch.randn(shape).to(dtype), layout) for _ in range(3))
    seeds, noise = torch.arange(shape[0]) - 1, lay(torch.randn(shape).to(dtype), layout)
    rows = [torch.tensor(3), torch.tensor(ROWS[: shape[0]])]
    sources = [{}, {"noise": noise}, {"seeds": seeds}]
    for clip, row, source, guided in itertools.product((None, 0.8), rows, sources, (False, True)):
        table = table_for(clip)
        guidance = {"guidance": 2.5} if guided else {}
        output = torch.cat([m, m2]) if guided else m
        out, x0 = dx.sampler_step(
            x,
            output,
            *table.tensors(x.device),
            row,
            clip=clip,
            return_x0=True,
            **source,
            **guidance,
        )
        expected, expected_x0 = reference_step(table, x, output, row, **source, **guidance)
        assert_close(out, expected, dtype)
        assert_close(x0, expected_x0, dtype)
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_in_place_equals_out_of_place(layout):
    x, m = (lay(torch.randn(2, 3, 7, 5), layout) for _ in range(2))
    table = table_for(None)
    args = (*table.tensors(x.device), torch.tensor(2), None, torch.tensor([8, 9]), None, None, 1.0)
    expected, _ = kernels().sampler_step(x, m, *args, False)
    pointer = x.data_ptr()
    kernels().sampler_step_(x, m, *args)
    assert x.data_ptr() == pointer
    assert same_bits(x, expected)


def test_layouts_give_the_same_bits():
    shape = (2, 5, 9, 11)
    x, m = torch.randn(shape), torch.randn(shape)
    args = (*table_for(1.0).tensors(x.device), torch.tensor(2))
    outs = [
        dx.sampler_step(lay(x, a), lay(m, b), *args, seeds=torch.tensor([8, 9]), clip=1.0)
        for a, b in itertools.product(("contiguous", "channels_last"), ("strided", "channels_last"))
    ]
    assert all(same_bits(outs[0], out) for out in outs[1:])


def test_history_enters_with_its_weight():
    x, m, h = (torch.randn(2, 3, 4, 4) for _ in range(3))
    coefficients = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    out = dx.sampler_step(x, m, coefficients, torch.tensor([3]), torch.tensor(0), history=h)
    assert_close(out, 3 * x + 4 * m + 5 * (x + 2 * m) + 6 * h, torch.float32)


def test_each_row_reads_its_own_timestep():
    """Rows of the noise's counter: a batch over several rows equals the samples one at a time."""
    x, m, seeds = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8), torch.tensor([5, 6, 7])
    args = table_for(None).tensors(x.device)
    whole = dx.sampler_step(x, m, *args, torch.tensor(ROWS), seeds=seeds)
    for b in range(3):
        one = slice(b, b + 1)
        alone = dx.sampler_step(x[one], m[one], *args, torch.tensor(ROWS[b]), seeds=seeds[one])
        assert same_bits(whole[one], alone)


def test_an_x0_beyond_float32_does_not_spoil_the_step():
    """alpha_bar = 1e-90: x0 is not to be had, but the step is, (x - ε)/√α (Ho et al. 2020)."""
    table = dx.ddpm(dx.NoiseSchedule.from_betas([0.999] * 30))
    x, eps = torch.randn(2, 1, 4)
    out = dx.sampler_step(x, eps, *table.tensors(x.device), torch.tensor(0))
    expected = (x.double() - 0.999 * eps) / 0.001**0.5
    assert_close(out, expected, torch.float32, 64)


def test_zero_noise_weight_ignores_the_noise():
    table = dx.ddim(SCHEDULE, 10)
    x, m = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    args = (x, m, *table.tensors(x.device), torch.tensor(0))
    plain = dx.sampler_step(*args)
    assert same_bits(plain, dx.sampler_step(*args, seeds=torch.tensor([1, 2])))
    assert same_bits(plain, dx.sampler_step(*args, noise=torch.full_like(x, torch.nan)))


def test_nan_survives_clipping():
    x = torch.full((1, 4), torch.nan)
    out = dx.sampler_step(x, x, *table_for(1.0).tensors(x.device), torch.tensor(0), clip=1.0)
    assert out.isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    x, seeds = torch.randn(shape), torch.arange(shape[0])
    args = table_for(None).tensors(x.device)
    assert dx.sampler_step(x, x, *args, torch.tensor(0), seeds=seeds).shape == shape


@pytest.mark.backends("cpu", "cuda")
def test_gradients_flow_through_the_step():
    x, m = (torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tensors = table_for(0.9).tensors(x.device, torch.float64)

    def step(x, m):
        return dx.sampler_step(x, m, *tensors, torch.tensor(3), clip=0.9, return_x0=True)

    assert torch.autograd.gradcheck(step, (x, m))
    x32 = x.detach().float().requires_grad_()
    args = table_for(None).tensors(x.device)
    dx.sampler_step(x32, m.detach().float(), *args, torch.tensor(3)).sum().backward()
    assert_close(x32.grad, torch.full_like(x32, table_for(None).weights[3, 2]), torch.float32)
    m32 = m.detach().float().requires_grad_()  # alone: x needs no gradient
    dx.sampler_step(x32.detach(), m32, *args, torch.tensor(3)).sum().backward()
    assert_close(m32.grad, torch.full_like(m32, table_for(None).weights[3, 3]), torch.float32)


# --- the steps that drop into a loop ---


def test_ddpm_step_is_the_formula():
    """(x - eps (1-alpha)/sqrt(1-alpha_bar))/sqrt(alpha) + sqrt(beta) z, with z = 0 at t = 1."""
    x, eps, z = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    for t in (1, 2, 50, 100):
        alpha, alpha_bar = 1 - SCHEDULE.beta[t], SCHEDULE.alpha_bar[t]
        expected = (x - eps * (1 - alpha) / (1 - alpha_bar) ** 0.5) / alpha**0.5
        expected = expected + (SCHEDULE.beta[t] ** 0.5 * z if t > 1 else 0)
        for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            args = x.to(dtype), eps.to(dtype), t, SCHEDULE
            out = dx.ddpm_step(*args, noise=z.to(dtype))
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    per_sample = dx.ddpm_step(x, eps, torch.tensor([1, 50, 100]), SCHEDULE, noise=z)
    torch.testing.assert_close(per_sample[2], out[2].double(), rtol=0, atol=1e-5)
    alone = dx.ddpm_step(x[:1], eps[:1], 1, SCHEDULE)
    torch.testing.assert_close(per_sample[:1], alone, rtol=0, atol=1e-12)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_the_formula(eta):
    x, eps, z = (torch.randn(2, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    for t, t_prev in ((100, 95), (7, 6), (7, 0)):
        ab, ab_prev = SCHEDULE.alpha_bar[t], SCHEDULE.alpha_bar[t_prev]
        sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)) ** 0.5
        x0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
        expected = ab_prev**0.5 * x0 + (1 - ab_prev - sigma**2) ** 0.5 * eps + sigma * z
        out = dx.ddim_step(x, eps, t, t_prev, SCHEDULE, eta=eta, noise=z)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_noise_from_a_generator_a_seed_or_torch():
    x, eps = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), device="cpu")
    by_generator = dx.ddpm_step(x, eps, 50, SCHEDULE, noise=torch.Generator().manual_seed(3))
    assert same_bits(by_generator, dx.ddpm_step(x, eps, 50, SCHEDULE, noise=drawn.to(x.device)))
    by_seed = dx.ddpm_step(x, eps, 50, SCHEDULE, seeds=4)
    assert same_bits(by_seed, dx.ddpm_step(x, eps, 50, SCHEDULE, seeds=torch.tensor([4, 5])))
    torch.manual_seed(1)
    dx.ddpm_step(x, eps, 1, SCHEDULE)  # adds no noise: draws none
    first = dx.ddpm_step(x, eps, 50, SCHEDULE)
    second = dx.ddpm_step(x, eps, 50, SCHEDULE)
    torch.manual_seed(1)
    assert same_bits(first, dx.ddpm_step(x, eps, 50, SCHEDULE))
    assert not torch.equal(first, second)
