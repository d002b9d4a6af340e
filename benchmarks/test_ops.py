"""The fused ops beside the eager formulas they replace, in one run.

`make bench` prints the times; each group is one piece of work. Every implementation is compared
with the float64 reference before it is timed. No test asserts a time: the machine is shared.
"""

import pytest
import torch
from eager import SCHEDULE, STEP, ddpm_mean, group_norm_silu

import diffusion_ext as dx


def ddpm_calls(x, eps):
    y, sigma = torch.empty_like(x), SCHEDULE.beta[STEP] ** 0.5
    tensors, seeds = dx.ddpm(SCHEDULE).tensors(x.device), torch.arange(len(x))
    row = torch.tensor(SCHEDULE.timesteps - STEP)
    return {
        "copy": lambda: y.copy_(x),
        "eager": lambda: ddpm_mean(x, eps) + sigma * torch.randn_like(x),
        "fused": lambda: dx.sampler_step(x, eps, *tensors, row, seeds=seeds),
    }


@pytest.mark.parametrize("shape", [(64, 4, 64, 64), (32, 3, 16, 16)], ids=str)
@pytest.mark.parametrize("which", ["copy", "eager", "fused"])
def test_ddpm_update_with_noise(benchmark, shape, which):
    benchmark.group = f"DDPM update + noise {shape}"
    x, eps = torch.randn(shape), torch.randn(shape)
    call = ddpm_calls(x, eps)[which]
    if which != "copy":
        z = (call() - ddpm_mean(x.double(), eps.double())) / SCHEDULE.beta[STEP] ** 0.5
        assert z.mean().item() == pytest.approx(0, abs=0.03)
        assert z.std().item() == pytest.approx(1, abs=0.03)
    benchmark.pedantic(call, rounds=30, warmup_rounds=3)


SHAPES = {
    "(8, 320, 64, 64)": ((8, 320, 64, 64), 32),
    "(32, 256, 16, 16)": ((32, 256, 16, 16), 8),
    "(64, 64, 32, 32)": ((64, 64, 32, 32), 8),
    "(1, 128, 256, 256)": ((1, 128, 256, 256), 32),
}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def norm_calls(x, groups, weight, bias):
    y = torch.empty_like(x)
    return {
        "copy": lambda: y.copy_(x),
        "eager": lambda: group_norm_silu(x, groups, weight, bias),
        "fused": lambda: dx.group_norm_act(x, groups, weight, bias),
    }


def norm_inputs(shape, memory_format):
    x = torch.randn(shape).to(memory_format=FORMATS[memory_format])
    return x, torch.randn(shape[1]), torch.randn(shape[1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", ["copy", "eager", "fused"])
def test_group_norm_silu(benchmark, shape, memory_format, which):
    benchmark.group = f"GroupNorm + SiLU {shape} {memory_format}"
    (shape, groups) = SHAPES[shape]
    x, weight, bias = norm_inputs(shape, memory_format)
    call = norm_calls(x, groups, weight, bias)[which]
    if which != "copy":
        with dx.use_backend("reference"):
            exact = dx.group_norm_act(x.double(), groups, weight, bias)
        torch.testing.assert_close(call().double(), exact, rtol=0, atol=1e-4)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", list(SHAPES)[:3])
@pytest.mark.parametrize("which", ["eager", "fused"])
def test_group_norm_silu_training(benchmark, shape, memory_format, which):
    benchmark.group = f"GroupNorm + SiLU forward and backward {shape} {memory_format}"
    (shape, groups) = SHAPES[shape]
    x, weight, bias = (t.requires_grad_() for t in norm_inputs(shape, memory_format))
    dy = torch.randn_like(x)
    calls = norm_calls(x, groups, weight, bias)

    def gradients(call):
        return torch.autograd.grad(call(), (x, weight, bias), dy)

    for ours, theirs in zip(gradients(calls[which]), gradients(calls["eager"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    benchmark.pedantic(lambda: gradients(calls[which]), rounds=10, warmup_rounds=1)
