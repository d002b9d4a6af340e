"""The memory format of torch's convolutions, predicted from strides, beside torch's."""

import random

import pytest
import torch
from strides import told, with_random_strides
from torch.nn import functional as F

from diffusion_ext.ops.layouts import convolves_to_channels_last

pytestmark = pytest.mark.backends("reference")


def strides_of(shape, channels_last: bool) -> tuple[int, ...]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, memory_format=layout).stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_torch_convolves_to_what_is_predicted(dtype, grad):
    draw, seen = random.Random(0), {True: 0, False: 0}
    for _ in range(500):
        batch, channels, height, width, out_channels = (draw.choice([1, 1, 2, 3]) for _ in range(5))
        rows, columns = draw.choice([(1, 1), (1, 1), (3, 3), (3, 1), (2, 2)])
        x = with_random_strides(draw, (batch, channels, height, width), dtype)
        weight = with_random_strides(draw, (out_channels, channels, rows, columns), dtype)
        bias = draw.choice([None, torch.randn(out_channels).to(dtype)])
        options = {"padding": draw.randint(1, 2), "stride": draw.randint(1, 2)}
        x.requires_grad_(grad), weight.requires_grad_(grad)
        y = F.conv2d(x, weight, bias, **options)
        predicted = convolves_to_channels_last(x, weight)
        assert y.stride() == strides_of(y.shape, predicted), told(x=x, weight=weight, y=y)
        if grad:
            dy = with_random_strides(draw, y.shape, dtype)
            (gradient,) = torch.autograd.grad(y, x, dy)
            assert gradient.stride() == strides_of(x.shape, predicted), told(x=x, weight=weight)
        seen[predicted] += 1
    assert min(seen.values()) > 60


@pytest.mark.parametrize(("batch", "side"), [(1, 64), (16, 16), (17, 24)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_of_sizes_for_which_torch_has_other_kernels(batch, side, kernel, grad):
    draw = random.Random(batch * kernel)
    for _ in range(8):
        x = with_random_strides(draw, (batch, 16, side, side))
        weight = with_random_strides(draw, (draw.choice([1, 8]), 16, kernel, kernel))
        y = F.conv2d(x, weight.requires_grad_(grad), padding=kernel // 2)
        predicted = convolves_to_channels_last(x, weight)
        assert y.stride() == strides_of(y.shape, predicted), told(x=x, weight=weight, y=y)
