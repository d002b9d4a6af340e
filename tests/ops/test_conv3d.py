"""conv3d: convolutions of images that move, by both algorithms, beside torch's."""

import os
import subprocess
import sys

import pytest
import torch
from harness import DTYPES, LAYOUTS, assert_close, lay, same_bits
from torch.nn import functional as F

from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.conv2d import conv2d, direct_filters, winograd_filters
from diffusion_ext.ops.conv3d import conv3d
from diffusion_ext.ops.reference import ACTIVATIONS

pytestmark = pytest.mark.backends("cpu")

FILTERS = {"direct": direct_filters, "winograd": winograd_filters}

# [B, C, T, H, W], K, kernel, stride, padding, which Winograd's algorithm serves: one frame and more
# than a block of tiles has, frames of zeros alone, any stride of time, any padding.
PLAIN = [
    ((2, 16, 5, 9, 7), 40, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((3, 32, 1, 5, 6), 3, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((1, 16, 2, 4, 4), 33, (3, 3, 3), (1, 1, 1), (2, 1, 1)),
    ((2, 16, 4, 7, 18), 16, (3, 3, 3), (1, 1, 1), (0, 0, 0)),
    ((1, 16, 41, 6, 6), 5, (3, 3, 3), (1, 1, 1), (1, 0, 1)),
    ((1, 48, 7, 9, 9), 20, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    ((1, 16, 9, 5, 17), 7, (3, 3, 3), (2, 1, 1), (0, 3, 2)),
    ((2, 16, 2, 2, 3), 7, (3, 3, 3), (1, 1, 1), (1, 9, 11)),  # tiles beside and below the images
    ((1, 16, 9, 8, 8), 7, (2, 3, 3), (3, 1, 1), (1, 1, 1)),
    ((1, 16, 3, 8, 8), 7, (5, 3, 3), (1, 1, 1), (4, 1, 1)),
    ((0, 16, 3, 8, 8), 7, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
]
# And those that only the direct one serves.
OTHERS = [
    ((2, 5, 4, 7, 6), 7, (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    ((1, 20, 5, 8, 9), 70, (3, 3, 3), (2, 2, 2), (0, 1, 1)),
    ((2, 33, 6, 5, 5), 34, (3, 1, 1), (1, 1, 1), (1, 0, 0)),
    ((3, 8, 3, 5, 20), 100, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 3, 4, 8, 8), 17, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((1, 1, 1, 1, 1), 1, (1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ((1, 4, 2, 9, 6), 6, (2, 4, 1), (1, 3, 2), (1, 0, 2)),
]
CASES = [("winograd", *problem) for problem in PLAIN]
CASES += [("direct", *problem) for problem in PLAIN + OTHERS]


def problem(shape, out_channels, kernel=(3, 3, 3), layout="channels_last", dtype=torch.float32):
    x = lay(torch.randn(shape).to(dtype), layout)
    scale = (shape[1] * kernel[0] * kernel[1] * kernel[2]) ** 0.5
    weight, bias = torch.randn(out_channels, shape[1], *kernel) / scale, torch.randn(out_channels)
    return x, weight.to(dtype), bias.to(dtype)


def exact(x, weight, bias, **options):
    bias = None if bias is None else bias.double()
    return F.conv3d(x.double(), weight.double(), bias, **options)


@pytest.mark.parametrize(("how", "shape", "out_channels", "kernel", "stride", "padding"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_convolution(how, shape, out_channels, kernel, stride, padding, dtype):
    x, weight, bias = problem(shape, out_channels, kernel, dtype=dtype)
    filters = FILTERS[how](weight)
    for b in (bias, None):
        y = conv3d(x, filters, b, out_channels, stride, padding)
        assert_close(y, exact(x, weight, b, stride=stride, padding=padding))
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [16, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(how, layout, channels, dtype):
    """More pixels and channels than are transposed at once."""
    x, weight, bias = problem((2, channels, 3, 7, 10), 37, layout=layout, dtype=dtype)
    of_weight = lay(weight, "channels_last")
    for contiguous in (False, True):
        y = conv3d(x, FILTERS[how](of_weight), bias, 37, contiguous=contiguous)
        assert_close(y, exact(x, weight, bias, padding=1))
        layout_of_y = torch.contiguous_format if contiguous else torch.channels_last_3d
        assert y.stride() == torch.empty(y.shape, memory_format=layout_of_y).stride()


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_after(how, act, layout, dtype):
    x, weight, bias = problem((2, 16, 4, 5, 6), 40, dtype=dtype)
    residual = lay(torch.randn(2, 40, 4, 5, 6).to(dtype), layout)
    y = conv3d(x, FILTERS[how](weight), bias, 40, residual=residual, act=act, scale=0.7)
    expected = ACTIVATIONS[act](exact(x, weight, bias, padding=1))
    assert_close(y, 0.7 * (expected + residual.double()))


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(how, dtype):
    x, weight, bias = problem((5, 32, 6, 12, 12), 80, dtype=dtype)
    filters, threads = FILTERS[how](weight), torch.get_num_threads()
    y = conv3d(x, filters, bias, 80)
    try:
        for count in (1, 2, 3, 5, 8, 16, 64):
            torch.set_num_threads(count)
            assert same_bits(conv3d(x, filters, bias, 80), y)
            assert same_bits(conv3d(x[:1], filters, bias, 80), y[:1])
            assert same_bits(conv3d(x.contiguous(), filters, bias, 80, contiguous=True), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_not_on_how_many_frames_there_are(how, dtype):
    """A causal decoder may take a film in pieces."""
    x, weight, bias = problem((1, 16, 13, 8, 9), 20, dtype=dtype)
    filters, padding = FILTERS[how](weight), (0, 1, 1)
    y = conv3d(x, filters, bias, 20, padding=padding)
    for first, count in ((0, 1), (3, 4), (8, 3)):
        piece = conv3d(x[:, :, first : first + count + 2], filters, bias, 20, padding=padding)
        assert same_bits(piece, y[:, :, first : first + count])


@pytest.mark.parametrize("how", FILTERS)
def test_images_that_do_not_move(how):
    """One frame under filters of one frame has conv2d's bits."""
    x, weight, bias = problem((2, 32, 1, 9, 11), 40, (1, 3, 3))
    y = conv3d(x, FILTERS[how](weight), bias, 40, padding=(0, 1, 1))
    image, filters = lay(x[:, :, 0], "channels_last"), FILTERS[how](weight[:, :, 0])
    assert same_bits(y[:, :, 0], conv2d(image, filters, bias, 40))


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    """Each lays filters out in its own way."""
    x, weight, bias = problem((2, 32, 3, 9, 9), 40)
    torch.save((x, weight, bias), tmp_path / "inputs")
    script = (
        "import sys, torch; from diffusion_ext.ops.conv3d import *;"
        "from diffusion_ext.ops.conv2d import direct_filters as d, winograd_filters as w;"
        "x, weight, b = torch.load(sys.argv[1]);"
        "ys = [conv3d(x, f(weight), b, len(weight), act='gelu') for f in (d, w)];"
        "torch.save(ys, sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "inputs", tmp_path / "y"],
        env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
        check=True,
    )
    for y in torch.load(tmp_path / "y"):
        assert_close(y, F.gelu(exact(x, weight, bias, padding=1)))


def test_an_infinity_and_a_nan_stay():
    x, weight, bias = problem((1, 16, 4, 8, 8), 16)
    x[0, 3, 2, 4, 4], x[0, 5, 0, 0, 0] = torch.inf, torch.nan
    y = conv3d(x, direct_filters(weight), bias, 16, act="relu")
    expected = F.relu(F.conv3d(x, weight, bias, padding=1))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_fakes():
    x, weight, bias = problem((2, 16, 3, 8, 8), 40)
    residual, ops = torch.randn(2, 40, 3, 8, 8), kernels()
    for call in (
        (ops.conv3x3_filters.default, (weight,)),
        (ops.conv2d_filters.default, (weight, False)),
        (
            ops.conv3d.default,
            (x, winograd_filters(weight), bias, residual, 40, *[1] * 6, 3, 0.5, False),
        ),
        (
            ops.conv3d.default,
            (x, direct_filters(weight), None, None, 40, 2, 1, 2, 1, 0, 2, 0, 1.0, True),
        ),
    ):
        torch.library.opcheck(*call)


# --- what the kernel refuses ----------------------------------------------------------------------

GOOD = {"x": torch.zeros(1, 16, 3, 4, 4), "bias": torch.zeros(20), "out_channels": 20}


@pytest.mark.parametrize("how", FILTERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(16, 3, 4, 4)}, r"x: wanted shape \[B, C, T, H, W\]"),
        ({"x": torch.zeros(1, 16, 3, 4, 4).double()}, "x: wanted float32, float16 or bfloat16 on"),
        ({"x": torch.zeros(1, 32, 3, 4, 4)}, "filters: wanted those of 32 channels to 20"),
        ({"out_channels": 33}, "filters: wanted those of 16 channels to 33"),
        ({"out_channels": -1}, "conv3d: wanted positive numbers"),
        ({"filters": torch.zeros(1, 36, 16, 32)}, "filters: wanted what conv2d_filters or"),
        ({"bias": torch.zeros(3)}, r"bias: wanted shape \[20\]"),
        ({"bias": torch.zeros(20).half()}, "bias: wanted x's dtype"),
        ({"residual": torch.zeros(1, 20, 4, 4)}, r"residual: wanted shape \[B, C, T, H, W\]"),
        ({"residual": torch.zeros(1, 20, 3, 4, 4).half()}, "residual: wanted x's dtype"),
        ({"residual": torch.zeros(1, 20, 2, 4, 4)}, "residual: wanted the outputs' shape"),
        ({"stride": (0, 1, 1)}, "conv3d: wanted positive numbers"),
        ({"padding": (1, 1, -1)}, "conv3d: wanted positive numbers"),
        ({"x": torch.zeros(1, 16, 0, 4, 4)}, "x: wanted images at least as large as the filters"),
        ({"padding": (1, 1, 0), "x": torch.zeros(1, 16, 3, 4, 2)}, "x: wanted images at least"),
    ],
)
def test_the_kernel_refuses(how, change, message):
    filters = FILTERS[how](torch.zeros(20, 16, 3, 3, 3))
    with pytest.raises(RuntimeError, match=message):
        conv3d(**(GOOD | {"filters": filters} | change))


def test_what_only_one_algorithm_refuses():
    x, weight, _ = problem((1, 24, 3, 4, 4), 20)
    with pytest.raises(RuntimeError, match="x: wanted channels in multiples of 16"):
        conv3d(x, winograd_filters(weight), None, 20)
    with pytest.raises(RuntimeError, match="stride 1 within a frame"):
        conv3d(x, winograd_filters(weight), None, 20, stride=(1, 2, 2))
    with pytest.raises(RuntimeError, match="act: unknown"):
        kernels().conv3d(x, direct_filters(weight), None, None, 20, *[1] * 6, 9, 1.0, False)
    with pytest.raises(RuntimeError, match=r"weight: wanted shape \[K, C, R, S\] or"):
        direct_filters(weight, transposed=True)
    with pytest.raises(RuntimeError, match=r"weight: wanted shape \[K, C, 3, 3\] or"):
        winograd_filters(weight[..., :2])
