"""conv3x3: Winograd's convolution beside the direct one, its gradients, and when it serves."""

import pytest
import torch
from harness import LAYOUTS, assert_close, lay, same_bits
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn.winograd_conv2d import WinogradConv2d
from diffusion_ext.ops import conv3x3 as op
from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.conv2d import VECTORISED, conv2d, winograd_filters
from diffusion_ext.ops.group_norm_act import ACTIVATIONS

pytestmark = pytest.mark.backends("cpu")
served = pytest.mark.skipif(not VECTORISED, reason="the kernel serves with vector units only")

# [B, C, H, W], K: tiles that fit and that do not, more blocks of them than threads, channels of one
# to several blocks of lanes and columns, images smaller than a tile, an empty batch.
PROBLEMS = [
    ((2, 16, 8, 8), 16),
    ((3, 32, 16, 16), 33),
    ((1, 48, 7, 10), 64),
    ((5, 16, 13, 29), 40),
    ((2, 16, 3, 4), 17),
    ((1, 16, 1, 1), 3),
    ((70, 16, 4, 4), 32),
    ((0, 16, 8, 8), 16),
    ((1, 256, 8, 8), 16),
]


def problem(shape, out_channels, layout="channels_last"):
    x = lay(torch.randn(shape), layout)
    weight = torch.randn(out_channels, shape[1], 3, 3) / (3 * shape[1] ** 0.5)
    return x, weight, torch.randn(out_channels)


def exact(x, weight, bias, act="identity"):
    bias = None if bias is None else bias.double()
    return reference.conv3x3(x.double(), weight.double(), bias, act)


def laid_out(x, weight, bias, act="identity"):
    """By filters that were transformed before."""
    return conv2d(x, winograd_filters(weight), bias, len(weight), act=act)


@pytest.mark.parametrize(("shape", "out_channels"), PROBLEMS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_is_the_direct_convolution(shape, out_channels, act):
    x, weight, bias = problem(shape, out_channels)
    for b in (bias, None):
        y = laid_out(x, weight, b, act)
        assert_close(y, exact(x, weight, b, act))
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    x, weight, bias = problem((3, 16, 8, 8), 24, layout)
    for w in (weight, weight.to(memory_format=torch.channels_last), weight.flip(0)[::2]):
        assert_close(laid_out(x, w, bias[: len(w)]), exact(x, w, bias[: len(w)]))


def test_rounding_is_near_that_of_a_direct_sum():
    x, weight, bias = problem((8, 64, 16, 16), 64)
    expected = exact(x, weight, bias)
    ours = laid_out(x, weight, bias) - expected
    direct = F.conv2d(x, weight, bias, padding=1) - expected
    assert ours.square().mean().sqrt() < 2.5 * direct.square().mean().sqrt()


def test_bits_depend_neither_on_threads_nor_on_the_batch():
    x, weight, bias = problem((9, 32, 12, 12), 48)
    threads = torch.get_num_threads()
    y = laid_out(x, weight, bias)
    dweight = kernels().conv3x3_weight_gradient(x, y, weight)
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            assert same_bits(laid_out(x, weight, bias), y)
            assert same_bits(kernels().conv3x3_weight_gradient(x, y, weight), dweight)
    finally:
        torch.set_num_threads(threads)
    for b in range(9):
        assert same_bits(laid_out(x[b : b + 1], weight, bias), y[b : b + 1])


# --- gradients ------------------------------------------------------------------------------------


def gradients(f, *inputs):
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in inputs]
    leaves = [t.requires_grad_() for t in leaves]
    y = f(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, dy)


@served
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])  # of the weight
@pytest.mark.parametrize(
    ("shape", "out_channels"),
    [
        ((8, 32, 12, 12), 48),
        ((3, 64, 19, 22), 32),
        ((70, 16, 4, 4), 20),
        ((64, 16, 4, 4), 16),
        ((1, 96, 32, 32), 112),
        ((2, 272, 16, 16), 48),  # more channels of x than a part of its weight's gradient has
    ],
)
def test_gradients(shape, out_channels, layout):
    x, weight, bias = problem(shape, out_channels)
    inputs = x, lay(weight, layout), bias
    ours = gradients(op.conv3x3, *inputs)
    assert "Conv3x3" in type(ours[0].grad_fn).__name__
    expected = gradients(exact, *(t.double() for t in inputs))
    for mine, theirs, like in zip(ours[1:], expected[1:], inputs, strict=True):
        assert_close(mine, theirs, factor=2)
        assert mine.stride() == like.stride() or out_channels == 20  # which torch serves


@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, True, True)]
)
@pytest.mark.parametrize("with_bias", [True, False])
def test_only_the_gradients_that_are_wanted(wanted, with_bias):
    inputs = problem((8, 16, 12, 12), 16)
    if not with_bias:
        inputs, wanted = (*inputs[:2], None), (*wanted[:2], False)
    for t, w in zip(inputs, wanted, strict=True):
        if w:
            t.requires_grad_()
    op.conv3x3(*inputs).sum().backward()
    ours = [t.grad for t, w in zip(inputs, wanted, strict=True) if w]
    leaves = [t for t, w in zip(inputs, wanted, strict=True) if w]
    expected = torch.autograd.grad(F.conv2d(*inputs, padding=1).sum(), leaves)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_a_gradient_has_a_gradient():
    inputs = problem((8, 16, 12, 12), 16)

    def penalty(f):
        x, weight, bias = (t.detach().clone().requires_grad_() for t in inputs)
        (dx_,) = torch.autograd.grad(f(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx_.square().sum(), (x, weight, bias))

    for mine, theirs in zip(penalty(op.conv3x3), penalty(exact), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-3, atol=1e-3)


# --- when it serves -------------------------------------------------------------------------------


@served
def test_serves():
    x, weight, _ = problem((2, 16, 8, 8), 16)
    assert op.serves_conv3x3(x, weight)
    assert not op.serves_conv3x3(x.contiguous(), weight)
    assert not op.serves_conv3x3(x.double(), weight.double())
    assert not op.serves_conv3x3(x, weight.half())
    assert not op.serves_conv3x3(x[:, :8], weight)
    assert not op.serves_conv3x3(x[0], weight)
    assert not op.serves_conv3x3(x, weight[:15])
    for size, serves in ((5, False), (7, True), (4, True)):  # of 64, 64 and 16 pixels of tiles
        image = x[:, :, :size, :size].contiguous(memory_format=torch.channels_last)
        assert op.serves_conv3x3(image, weight) == serves
    with torch.autocast("cpu"):
        assert not op.serves_conv3x3(x, weight)
    with dx.use_backend("reference"):
        assert not op.serves_conv3x3(x, weight)


@served
@pytest.mark.parametrize(("batch", "is_ours"), [(7, False), (8, True)])  # of 4 tiles each
def test_few_tiles_are_torchs(batch, is_ours):
    x, weight, bias = problem((batch, 16, 8, 8), 16)
    y = op.conv3x3(x, weight.requires_grad_(), bias)
    assert ("Conv3x3" in type(y.grad_fn).__name__) == is_ours


@pytest.mark.parametrize("batch", [1, 7, 8, 40])  # of 4 tiles each: few are torch's
@pytest.mark.parametrize("grad", [True, False])
def test_the_module_is_a_conv2d(batch, grad):
    ours = WinogradConv2d(16, 32, kernel_size=3, padding=1).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(16, 32, 3, padding=1)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = lay(torch.randn(batch, 16, 8, 8), "channels_last")
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x[0]), plain(x[0]))  # unbatched
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="channels"):
            ours(x[:, :8])
        assert ours.double()(x.double()).dtype == torch.float64


@pytest.mark.compiles
def test_compiles_to_one_graph_forward_and_backward():
    inputs = problem((8, 16, 12, 12), 16)
    compiled = torch.compile(lambda *i: op.conv3x3(*i) * 2, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(
        gradients(compiled, *inputs), gradients(lambda *i: op.conv3x3(*i) * 2, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_fakes():
    x, weight, bias = problem((2, 16, 8, 8), 40)
    ops = kernels()
    for call in (
        (ops.conv3x3_filters.default, (weight,)),
        (ops.conv3x3_once.default, (x, weight, bias, False)),
        (
            ops.conv3x3_once.default,
            (torch.randn(2, 48, 8, 8), weight.new_ones(48, 16, 3, 3), None, True),
        ),
        (
            ops.conv3x3_weight_gradient.default,
            (x, torch.randn(2, 48, 8, 8), weight.new_ones(48, 16, 3, 3)),
        ),
    ):
        torch.library.opcheck(*call)


# --- what the kernels refuse ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", [torch.zeros(2, 16, 3), torch.zeros(2, 16, 5, 5)])
def test_filters_refuse(weight):
    with pytest.raises(RuntimeError, match=r"weight: wanted shape \[K, C, 3, 3\]"):
        winograd_filters(weight)
    with pytest.raises(RuntimeError, match=r"weight: wanted shape \[K, C, 3, 3\]"):
        kernels().conv3x3_once(torch.zeros(1, 16, 4, 4), weight, None, False)


@pytest.mark.parametrize(("transposed", "got"), [(False, 32), (True, 48)])
def test_a_weight_of_other_channels_is_refused(transposed, got):
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(48, 32, 3, 3)
    with pytest.raises(RuntimeError, match=f"weight: wanted x's 16 channels, got {got}"):
        kernels().conv3x3_once(x, weight, None, transposed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.zeros(1, 20, 4, 4)}, "dy: wanted channels in multiples of 16"),
        ({"dy": torch.zeros(2, 32, 4, 4)}, "dy: wanted x's batch and size"),
        ({"dy": torch.zeros(1, 32, 4, 5)}, "dy: wanted x's batch and size"),
        ({"x": torch.zeros(1, 16, 4, 4).half()}, "x: wanted float32 on the CPU"),
        ({"weight": torch.zeros(32, 32, 3, 3)}, r"weight: wanted shape \[32, 16, 3, 3\]"),
        ({"weight": torch.zeros(32, 16, 3, 1)}, r"weight: wanted shape \[32, 16, 3, 3\]"),
    ],
)
def test_the_weight_gradient_refuses(change, message):
    call = {"x": (1, 16, 4, 4), "dy": (1, 32, 4, 4), "weight": (32, 16, 3, 3)}
    call = {name: torch.zeros(shape) for name, shape in call.items()} | change
    with pytest.raises(RuntimeError, match=message):
        kernels().conv3x3_weight_gradient(**call)
