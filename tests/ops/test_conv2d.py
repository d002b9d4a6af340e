"""conv2d: convolutions of weights that were laid out before, both algorithms, beside torch's."""

import os
import subprocess
import sys

import pytest
import torch
from harness import DTYPES, LAYOUTS, assert_close, lay, same_bits
from torch.nn import functional as F

from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.conv2d import (
    CPU_CAPABILITY,
    conv2d,
    direct_filters,
    winograd_filters,
    winograd_is_faster,
)
from diffusion_ext.ops.reference import ACTIVATIONS

pytestmark = pytest.mark.backends("cpu")

# [B, C, H, W], K, kernel, stride, padding: channels of less than a vector to several blocks,
# filters of all kinds, more pixels than a task takes, more filters than pixels, an empty batch.
PROBLEMS = [
    ((2, 3, 16, 16), 64, (3, 3), (1, 1), (1, 1)),
    ((1, 64, 16, 16), 3, (3, 3), (1, 1), (1, 1)),
    ((3, 20, 7, 9), 40, (3, 3), (2, 2), (1, 1)),
    ((1, 16, 12, 12), 33, (7, 7), (1, 1), (3, 3)),
    ((2, 8, 5, 5), 100, (1, 1), (1, 1), (0, 0)),
    ((1, 5, 8, 10), 7, (4, 2), (2, 1), (1, 0)),
    ((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0)),
    ((1, 2, 3, 3), 17, (5, 5), (1, 1), (2, 2)),
    ((1, 130, 2, 2), 70, (3, 3), (1, 1), (1, 1)),
    ((70, 16, 4, 4), 40, (3, 3), (1, 1), (1, 1)),
    ((0, 3, 8, 8), 4, (3, 3), (1, 1), (1, 1)),
    ((1, 4, 6, 6), 8, (3, 3), (3, 3), (0, 0)),
]


def problem(shape, out_channels, kernel=(3, 3), layout="channels_last", dtype=torch.float32):
    x = lay(torch.randn(shape).to(dtype), layout)
    scale = (shape[1] * kernel[0] * kernel[1]) ** 0.5
    weight, bias = torch.randn(out_channels, shape[1], *kernel) / scale, torch.randn(out_channels)
    return x, weight.to(dtype), bias.to(dtype)


def exact(x, weight, bias, **options):
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, **options)


@pytest.mark.parametrize(("shape", "out_channels", "kernel", "stride", "padding"), PROBLEMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_direct_convolution(shape, out_channels, kernel, stride, padding, layout, dtype):
    x, weight, bias = problem(shape, out_channels, kernel, layout, dtype)
    filters = direct_filters(weight)
    for b in (bias, None):
        y = conv2d(x, filters, b, out_channels, stride, padding)
        assert_close(y, exact(x, weight, b, stride=stride, padding=padding))
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("out_channels", [5, 40])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_convolution_of_as_great_a_stride(side, out_channels, parts, dtype):
    x = lay(torch.randn(3, 24, 4, 5).to(dtype), "channels_last")
    weight = (torch.randn(24, out_channels, side, side) / 5).to(dtype)
    bias = torch.randn(out_channels).to(dtype)
    first = 24 if parts == 1 else 8
    pieces = [lay(t.clone(), "channels_last") for t in x.split([first, 24 - first], dim=1)]
    skip = pieces[1] if parts == 2 else None
    filters, padding = direct_filters(weight, transposed=True), (0, 0)
    y = conv2d(pieces[0], filters, bias, out_channels, (1, 1), padding, skip=skip, side=side)
    assert_close(y, F.conv_transpose2d(x.double(), weight.double(), bias.double(), stride=side))


FILTERS = {"direct": direct_filters, "winograd": winograd_filters}


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("out_channels", [16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_before_and_after(how, act, out_channels, dtype):
    """Two inputs side by side, upsampled; the activation, then the residual and the scale."""
    x, skip = (lay(torch.randn(2, c, 5, 6).to(dtype), "channels_last") for c in (16, 32))
    _, weight, bias = problem((1, 48, 1, 1), out_channels, dtype=dtype)
    residual = lay(torch.randn(2, out_channels, 10, 12).to(dtype), "channels_last")
    y = conv2d(
        x, FILTERS[how](weight), bias, out_channels,
        skip=skip, residual=residual, repeat=2, act=act, scale=0.7,
    )  # fmt: skip
    inputs = F.interpolate(torch.cat((x, skip), dim=1), scale_factor=2)
    expected = ACTIVATIONS[act](exact(inputs, weight, bias, padding=1))
    assert_close(y, 0.7 * (expected + residual.double()))


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(how, dtype):
    x, weight, bias = problem((9, 32, 12, 12), 80, dtype=dtype)
    filters, threads = FILTERS[how](weight), torch.get_num_threads()
    y = conv2d(x, filters, bias, 80)
    try:
        for count in (1, 2, 3, 5, 8, 16, 64):
            torch.set_num_threads(count)
            assert same_bits(conv2d(x, filters, bias, 80), y)
            assert same_bits(conv2d(x[:1], filters, bias, 80), y[:1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(capability, dtype, tmp_path):
    """Each lays filters out in its own way."""
    x, weight, bias = problem((3, 32, 9, 9), 40, dtype=dtype)
    torch.save((x, weight, bias), tmp_path / "inputs")
    script = (
        "import sys, torch; from diffusion_ext.ops.conv2d import *;"
        "from diffusion_ext.ops.conv2d import direct_filters as d, winograd_filters as w;"
        "x, weight, b = torch.load(sys.argv[1]);"
        "ys = [conv2d(x, f(weight), b, len(weight), act='gelu') for f in (d, w)];"
        "torch.save(ys, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "inputs", tmp_path / "y"],
        env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
        check=True,
    )
    for y in torch.load(tmp_path / "y"):
        assert_close(y, F.gelu(exact(x, weight, bias, padding=1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinity_and_a_nan_stay(dtype):
    x, weight, bias = problem((1, 16, 8, 8), 16, dtype=dtype)
    x[0, 3, 4, 4], x[0, 5, 0, 0] = torch.inf, torch.nan
    y = conv2d(x, direct_filters(weight), bias, 16, act="relu")
    expected = F.relu(F.conv2d(x, weight, bias, padding=1))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.skipif(CPU_CAPABILITY == "baseline", reason="no kernel of ours")
def test_the_algorithm_that_is_chosen():
    assert winograd_is_faster(1, 64, 64, 128, 128)
    assert winograd_is_faster(32, 8, 8, 128, 128)
    assert not winograd_is_faster(1, 4, 4, 512, 512)  # reading four times the weight
    assert not winograd_is_faster(8, 1, 1, 64, 64)
    assert not winograd_is_faster(8, 32, 32, 20, 64)  # no multiple of 16


def test_fakes():
    x, weight, bias = problem((2, 16, 8, 8), 40)
    skip, residual = lay(torch.randn(2, 16, 8, 8), "channels_last"), torch.randn(2, 40, 8, 8)
    ops = kernels()
    double = torch.cat((weight, weight), dim=1)
    upwards = torch.randn(16, 8, 2, 2)
    for call in (
        (ops.conv3x3_filters.default, (weight,)),
        (ops.conv2d_filters.default, (weight, False)),
        (ops.conv2d_filters.default, (upwards, True)),
        (
            ops.conv2d.default,
            (x, skip, winograd_filters(double), bias, residual, 40, 1, 1, 1, 1, 1, 1, 3, 0.5),
        ),
        (
            ops.conv2d.default,
            (x, None, direct_filters(weight), None, None, 40, 2, 1, 0, 1, 2, 1, 0, 1.0),
        ),
        (
            ops.conv2d.default,
            (x, None, direct_filters(upwards, True), None, None, 8, 1, 1, 0, 0, 1, 2, 0, 1.0),
        ),
    ):
        torch.library.opcheck(*call)


# --- what the kernel refuses ----------------------------------------------------------------------

GOOD = {"x": torch.zeros(1, 16, 4, 4), "bias": torch.zeros(20), "out_channels": 20}


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 4, 4)}, r"x: wanted shape \[B, C, H, W\]"),
        ({"x": torch.zeros(1, 16, 4, 4).double()}, "x: wanted float32, float16 or bfloat16 on the"),
        ({"x": torch.zeros(1, 32, 4, 4)}, "filters: wanted those of 32 channels to 20"),
        ({"out_channels": 33}, "filters: wanted those of 16 channels to 33"),
        ({"out_channels": -1}, "conv2d: wanted positive numbers"),
        ({"bias": torch.zeros(3)}, r"bias: wanted shape \[20\]"),
        ({"bias": torch.zeros(20).half()}, "bias: wanted x's dtype"),
        ({"skip": torch.zeros(1, 16, 4, 4).half()}, "skip: wanted x's dtype"),
        ({"residual": torch.zeros(1, 20, 4, 4).half()}, "residual: wanted x's dtype"),
        ({"skip": torch.zeros(1, 16, 4, 5)}, "skip: wanted 1 images of 4x4"),
        ({"skip": torch.zeros(1, 16, 4, 4)}, "filters: wanted those of 32 channels"),
        ({"residual": torch.zeros(2, 20, 4, 4)}, "residual: wanted 1 images of 4x4"),
        ({"residual": torch.zeros(1, 21, 4, 4)}, "residual: wanted 20 channels"),
        ({"stride": (0, 1)}, "conv2d: wanted positive numbers"),
        ({"side": 2}, "filters: wanted those"),
    ],
)
def test_the_kernel_refuses(how, change, message):
    filters = FILTERS[how](torch.zeros(20, 16, 3, 3))
    with pytest.raises(RuntimeError, match=message):
        conv2d(**(GOOD | {"filters": filters} | change))


def test_what_only_one_algorithm_refuses():
    x, weight, _ = problem((1, 24, 4, 4), 20)
    with pytest.raises(RuntimeError, match="x: wanted channels in multiples of 16"):
        conv2d(x, winograd_filters(weight), None, 20)
    with pytest.raises(RuntimeError, match="stride 1 and padding 1"):
        conv2d(x, winograd_filters(weight), None, 20, stride=(2, 2))
    with pytest.raises(RuntimeError, match="x: wanted images at least as large as the filters"):
        conv2d(x[:, :, :2, :2], direct_filters(weight), None, 20, padding=(0, 0))
    with pytest.raises(RuntimeError, match="act: unknown"):
        kernels().conv2d(x, None, direct_filters(weight), None, None, 20, 1, 1, 1, 1, 1, 1, 9, 1.0)
