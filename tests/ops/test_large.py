"""More than 2^31 elements in a sample, and more than 2^32 in a batch, where a GPU has the memory.

The results are checked in short runs of pixels from corner to corner: at most 64 of a channel. On
the CPU, and on the stand-in for a GPU, the same tests run on small samples, which tests the tests.
"""

import itertools

import numpy as np
import pytest
import torch
from harness import EMULATED, assert_close, same_bits

import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels

pytestmark = [
    pytest.mark.backends("cpu", "cuda"),
    pytest.mark.parametrize("samples", [1, 2]),
    pytest.mark.parametrize("layout", ["contiguous", "channels_last"]),
]

SCHEDULE = dx.NoiseSchedule.linear(100)
CHANNELS, RUN = 8, 64
SEEDS, TIMES = (3, -(2**62)), (57, 100)


@pytest.fixture
def draw(backend, samples, layout):
    """draw(tensors) makes one bfloat16 tensor, once there is memory for so many; then more."""
    small = backend == "cpu" or backend in EMULATED
    height, width = (6, 80) if small else (16400, 16384)
    shape = (samples, CHANNELS, height, width)
    checked = []

    def make(tensors=0):
        if backend == "cuda" and not checked:
            torch.cuda.empty_cache()
            need = (tensors * samples * 2 + 2) * CHANNELS * height * width  # bytes
            free, _ = torch.cuda.mem_get_info()
            if need > free:
                pytest.skip(f"wants {need >> 30} GiB of device memory, {free >> 30} are free")
            checked.append(True)
        if layout == "contiguous":
            return torch.randn(shape, dtype=torch.bfloat16)
        turned = (samples, height, width, CHANNELS)
        return torch.randn(turned, dtype=torch.bfloat16).movedim(-1, 1)

    return make


def runs(x):
    """(sample, channel, the index of a run of x[sample, channel], its first element in order)"""
    samples, channels, height, width = x.shape
    places = (
        range(samples),
        (0, channels // 2, channels - 1),
        (0, height // 2, height - 1),
        (0, width - RUN),
    )
    for b, c, row, column in itertools.product(*places):
        run = (b, slice(c, c + 1), row, slice(column, column + RUN))
        yield b, c, run, (c * height + row) * width + column


def normals(seed, step, stream, first):
    """RUN elements of a sample's noise from `first` on, both multiples of four, by the host."""
    block = np.arange(first // 4, (first + RUN) // 4)
    counters = np.stack([block, block >> 32, *(np.full_like(block, n) for n in (step, stream))], 1)
    keys = np.tile([[seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]], (len(block), 1))
    words = _C.philox4x32((counters & 0xFFFFFFFF).astype(np.uint32), keys.astype(np.uint32))
    z = np.concatenate([_C.box_muller(words[:, :2]), _C.box_muller(words[:, 2:])], axis=1)
    return torch.from_numpy(z.reshape(1, RUN)).to(torch.empty(0).device)


def test_philox_normal(draw, samples):
    out = draw(1)
    kernels().philox_normal_(out, torch.tensor(SEEDS[:samples]), 7, 1)
    for b, _, run, first in runs(out):
        assert same_bits(out[run], normals(SEEDS[b], 7, 1, first).bfloat16())


def test_sampler_step(draw, samples):
    x, m = draw(3), draw()
    table, row = dx.ddim(SCHEDULE, 10, eta=0.7), torch.tensor([1, 4])[:samples]
    step = (*table.tensors(x.device), row)
    out = dx.sampler_step(x, m, *step, seeds=torch.tensor(SEEDS[:samples]))
    exact = table.tensors(x.device, torch.float64)
    for b, _, run, first in runs(out):
        z = normals(SEEDS[b], int(table.timesteps[row[b].item()]), 1, first).double()
        args = (x[run].double(), m[run].double(), *exact, row[b : b + 1])
        assert_close(out[run], reference.sampler_step(*args, noise=z)[0], torch.bfloat16)


def test_perturb(draw, samples):
    x0 = draw(3)
    t, seeds = torch.tensor(TIMES[:samples]), torch.tensor(SEEDS[:samples])
    outputs = dx.perturb(x0, t, SCHEDULE, seeds=seeds, target="v")
    for b, _, run, first in runs(x0):
        z = normals(SEEDS[b], TIMES[b], 2, first).double()
        options = {"noise": z, "target": "v"}
        expected = dx.perturb(x0[run].double(), t[b : b + 1], SCHEDULE, **options)
        for ours, exact in zip(outputs, expected, strict=True):
            assert_close(ours[run], exact, torch.bfloat16)


def channel_sums(*tensors):
    """The sum of a product of tensors over each channel of each sample, in float64: [N, C]."""
    sums = torch.empty(tensors[0].shape[:2], dtype=torch.float64)
    for b, c in itertools.product(*map(range, sums.shape)):
        product = tensors[0][b, c].double()
        for other in tensors[1:]:
            product.mul_(other[b, c])
        sums[b, c] = product.sum()
    return sums


def test_denoising_loss(draw, samples):
    output = draw(3).requires_grad_()
    t, seeds = torch.tensor(TIMES[:samples]), torch.tensor(SEEDS[:samples])
    losses = dx.denoising_loss(output, output.detach(), t, SCHEDULE, seeds=seeds)
    size = output[0].numel()
    (residual,) = torch.autograd.grad(losses, output, torch.full_like(losses, size / 2))
    for b, _, run, first in runs(output):
        z = normals(SEEDS[b], TIMES[b], 2, first).double()
        assert_close(residual[run], output[run].double() - z, torch.bfloat16)
    exact = channel_sums(residual, residual).sum(1).to(losses.device) / size
    torch.testing.assert_close(losses.double(), exact, rtol=1e-3, atol=0)


def group_means(sums, groups, x):
    """Means over the groups from sums over the channels: [N, C]."""
    size = CHANNELS // groups
    means = sums.unflatten(1, (groups, size)).sum(2) / (size * x[0, 0].numel())
    return means.repeat_interleave(size, 1)


@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_group_norm_act(draw, samples, groups):
    x = draw(2)
    weight, bias = torch.randn(CHANNELS), torch.randn(CHANNELS)
    y = dx.group_norm_act(x, groups, weight, bias)
    mean = group_means(channel_sums(x), groups, x)
    rstd = (group_means(channel_sums(x, x), groups, x) - mean**2 + 1e-5).rsqrt()
    for b, c, run, _ in runs(x):
        a = (x[run].double() - mean[b, c]) * rstd[b, c] * weight[c] + bias[c]
        assert_close(y[run], torch.nn.functional.silu(a), torch.bfloat16)


@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_group_norm_act_backward(draw, samples, groups):
    """Of w·xhat, one w for all: dx = w rstd (dy - mean(dy) - xhat mean(dy xhat))."""
    x, dy = draw(4), draw()
    dy.add_(x, alpha=0.5).add_(1)  # so that both means count
    x.requires_grad_()
    weight = torch.full((CHANNELS,), 1.5).requires_grad_()
    y = dx.group_norm_act(x, groups, weight, act="identity")
    ours, dweight = torch.autograd.grad(y, (x, weight), dy)
    x = x.detach()
    mean = group_means(channel_sums(x), groups, x)
    rstd = (group_means(channel_sums(x, x), groups, x) - mean**2 + 1e-5).rsqrt()
    dy_sums = channel_sums(dy)
    dy_xhat_sums = (channel_sums(dy, x) - mean * dy_sums) * rstd
    dy_mean, dy_xhat = (group_means(sums, groups, x) for sums in (dy_sums, dy_xhat_sums))
    assert_close(dweight, dy_xhat_sums.sum(0), torch.float32, factor=25)
    for b, c, run, _ in runs(x):
        xhat = (x[run].double() - mean[b, c]) * rstd[b, c]
        expected = 1.5 * rstd[b, c] * (dy[run].double() - dy_mean[b, c] - xhat * dy_xhat[b, c])
        assert_close(ours[run], expected, torch.bfloat16, factor=4)
