"""linear: linear layers of weights that were laid out before, with what follows them."""

import os
import subprocess
import sys

import pytest
import torch
from harness import DTYPES, assert_close, same_bits
from torch.nn import functional as F

from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.linear import linear, linear_bytes, linear_filters, serves_linear
from diffusion_ext.ops.reference import ACTIVATIONS

pytestmark = pytest.mark.backends("cpu")


def problem(rows, channels, out_features, dtype=torch.float32):
    weight = torch.randn(out_features, channels) / max(channels, 1) ** 0.5
    x, bias = torch.randn(*rows, channels), torch.randn(out_features)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def exact(x, weight, bias, *after, **options):
    bias = None if bias is None else bias.double()
    return reference.linear(x.double(), weight.double(), bias, *after, **options)


@pytest.mark.parametrize("size", range(1, 71))
def test_every_size(size):
    """Rows, channels and outputs of all of them, each beside other ones of the other two."""
    for rows, channels, out_features in (
        (size, 71 - size, 33),
        (3 * size + 1, size, 71 - size),
        (7, (5 * size) % 71, size),
    ):
        x, weight, bias = problem((rows,), channels, out_features)
        filters = linear_filters(weight)
        assert filters.nbytes == linear_bytes(out_features, channels)
        for b in (bias, None):
            y = linear(x, filters, b, out_features)
            assert_close(y, exact(x, weight, b))
            assert y.is_contiguous()


@pytest.mark.parametrize("rows", [(), (0,), (1,), (5, 0, 2), (2, 3, 5), (500,), (2, 300)], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_rows(rows, gated, dtype):
    x, weight, bias = problem(rows, 40, 90, dtype)
    y = linear(x, linear_filters(weight, gated), bias, 90 // (1 + gated), act="gelu", gated=gated)
    assert_close(y, exact(x, weight, bias, act="gelu", gated=gated))


@pytest.mark.parametrize(("channels", "out_features"), [(0, 5), (5, 0)])
def test_nothing_to_sum_or_to_write(channels, out_features):
    x, weight, bias = problem((3,), channels, out_features)
    filters = kernels().conv2d_filters(weight[:, :, None, None], False)
    assert_close(linear(x, filters, bias, out_features), exact(x, weight, bias))


STRIDES = {
    "sliced channels": lambda x: torch.cat((x, x), -1)[..., x.shape[-1] :],
    "sliced rows": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "transposed rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "not a number aligned": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x),
    "transposed channels": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_read_where_they_lie(strides, dtype):
    x, weight, bias = problem((3, 11), 24, 40, dtype)
    x = STRIDES[strides](x)
    assert serves_linear(x) == (strides != "transposed channels")
    residual = torch.randn(11, 3, 40).to(dtype).transpose(0, 1)
    y = linear(x, linear_filters(weight), bias, 40, residual=residual)
    assert_close(y, exact(x, weight, bias) + residual.double())
    assert y.is_contiguous()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_weights_of_any_strides(layout):
    x, weight, bias = problem((5,), 24, 40)
    laid = {
        "contiguous": weight,
        "transposed": weight.t().contiguous().t(),
        "sliced": torch.cat((weight, weight), 1)[:, 24:],
    }[layout]
    for gated in (False, True):
        y = linear(x, linear_filters(laid, gated), bias, 40 // (1 + gated), gated=gated)
        assert_close(y, exact(x, weight, bias, gated=gated))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("out_features", [1, 16, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_follows(act, out_features, dtype):
    x, weight, bias = problem((2, 29), 48, 2 * out_features, dtype)
    y = linear(x, linear_filters(weight, True), bias, out_features, act=act, gated=True)
    assert_close(y, exact(x, weight, bias, act=act, gated=True))
    y = linear(x, linear_filters(weight, True), None, out_features, act=act, gated=True)
    assert_close(y, exact(x, weight, None, act=act, gated=True))
    residual = torch.randn(2, 29, 2 * out_features).to(dtype)
    y = linear(x, linear_filters(weight), bias, 2 * out_features, residual, act)
    assert_close(y, exact(x, weight, bias, residual.double(), act))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_rows(gated, dtype):
    x, weight, bias = problem((450,), 70, 140, dtype)
    filters, threads = linear_filters(weight, gated), torch.get_num_threads()
    options = {"out_features": 140 // (1 + gated), "act": "silu", "gated": gated}
    y = linear(x, filters, bias, **options)
    try:
        for count in (1, 2, 3, 5, 8, 16, 64):
            torch.set_num_threads(count)
            for first, last in ((0, 450), (0, 1), (3, 5), (100, 299)):
                part = linear(x[first:last], filters, bias, **options)
                assert same_bits(part, y[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(capability, dtype, tmp_path):
    """Each lays weights out in its own way."""
    inputs = [problem((37,), c, k, dtype) for c, k in ((48, 80), (7, 66), (320, 34))]
    torch.save(inputs, tmp_path / "inputs")
    script = (
        "import sys, torch; from diffusion_ext.ops.linear import *;"
        "torch.save([[linear(x, linear_filters(w, g), b, len(b) // (1 + g), None, 'gelu', g)"
        " for g in (False, True)] for x, w, b in torch.load(sys.argv[1])], sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "inputs", tmp_path / "y"],
        env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
        check=True,
    )
    for problem_, results in zip(inputs, torch.load(tmp_path / "y"), strict=True):
        for gated, y in enumerate(results):
            assert_close(y, exact(*problem_, act="gelu", gated=bool(gated)))


def test_an_infinity_and_a_nan_stay_in_their_rows():
    x, weight, bias = problem((9,), 16, 40)
    x[3, 4], x[5, 0] = torch.inf, torch.nan
    y, expected = linear(x, linear_filters(weight), bias, 40), F.linear(x, weight, bias)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_fakes():
    x, weight, bias = problem((2, 5), 16, 40)
    residual = torch.randn(2, 5, 40)
    op = kernels().linear.default
    torch.library.opcheck(op, (x, linear_filters(weight), bias, residual, 40, 2, False))
    torch.library.opcheck(op, (x, linear_filters(weight, True), None, None, 20, 3, True))


GOOD = {"x": torch.zeros(3, 16), "bias": torch.zeros(20), "out_features": 20}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(0.0)}, r"x: wanted shape \[\*, C\]"),
        ({"x": torch.zeros(3, 16).double()}, "x: wanted float32, float16 or bfloat16 on"),
        ({"x": torch.zeros(3, 17)}, "filters: wanted those of 17 channels to 1 times 20"),
        ({"out_features": 33}, "filters: wanted those of 16 channels to 1 times 33"),
        ({"out_features": 10, "gated": True}, "filters: wanted those of 16 channels to 2 times 10"),
        ({"out_features": -1}, "out_channels: wanted how many there are"),
        ({"filters": linear_filters(torch.zeros(20, 16).half())}, "filters: wanted x's dtype"),
        ({"bias": torch.zeros(3)}, r"bias: wanted shape \[20\]"),
        ({"bias": torch.zeros(20).half()}, "bias: wanted x's dtype"),
        ({"residual": torch.zeros(20)}, "residual: wanted the outputs' shape"),
        ({"residual": torch.zeros(3, 20).double()}, "residual: wanted x's dtype"),
    ],
)
def test_the_kernel_refuses(change, message):
    filters = linear_filters(torch.zeros(20, 16))
    with pytest.raises(RuntimeError, match=message):
        linear(**(GOOD | {"filters": filters} | change))


def test_the_kernel_refuses_a_residual_beside_a_gate_and_an_unknown_activation():
    x, filters = torch.zeros(3, 16), linear_filters(torch.zeros(40, 16), gated=True)
    with pytest.raises(RuntimeError, match="residual: wanted none where there is a gate"):
        linear(x, filters, None, 20, residual=torch.zeros(3, 20), gated=True)
    with pytest.raises(RuntimeError, match="act: unknown"):
        kernels().linear(x, filters, None, None, 20, 9, True)
