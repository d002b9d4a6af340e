"""Weights that are laid out once: kept while they stay, never used once they have changed."""

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn import kept_weights
from diffusion_ext.nn.kept_filters import convolved, filter_bytes
from diffusion_ext.nn.kept_weights import kept_of
from diffusion_ext.nn.packed_conv2d import PackedConv2d
from diffusion_ext.nn.winograd_conv2d import WinogradConv2d
from diffusion_ext.ops.conv2d import TIMED

pytestmark = pytest.mark.skipif(not TIMED, reason="no kernel of ours")


def layer(channels=32, out_channels=48, **options):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1} | options
    conv = WinogradConv2d(channels, out_channels, **options)
    return conv.to(memory_format=torch.channels_last)


def images(channels=32, batch=2, side=16):
    return torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)


def laid_out(conv) -> PackedConv2d | None:
    kept = kept_of(conv)
    return None if kept is None else kept.packed


def assert_right(conv, x):
    with torch.no_grad():
        expected = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding)
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_kept_between_calls():
    conv, x = layer(), images()
    assert_right(conv, x)
    packed = laid_out(conv)
    filters = packed.winograd
    assert filters is not None
    assert packed.direct is None
    assert_right(conv, images())
    assert laid_out(conv) is packed
    assert packed.winograd is filters
    conv.bias.data.add_(1)  # is not laid out
    assert_right(conv, x)
    assert laid_out(conv) is packed


def merged(conv):
    """As peft merges an adapter."""
    conv.weight.data += 0.1 * torch.randn(48, 4).mm(torch.randn(4, 288)).view(48, 32, 3, 3)


def merged_twice(conv):
    """The allocator may give the second one the first one's memory."""
    for _ in range(2):
        conv.weight.data = conv.weight.data + torch.randn_like(conv.weight)
        gc.collect()


def averaged(conv):
    """As averages are swapped in."""
    conv.weight.data.copy_(torch.randn_like(conv.weight))


def one_filter(conv):
    conv.weight.data[17].zero_()


def one_input_channel(conv):
    conv.weight.data[:, 5].mul_(-1)


def by_numpy(conv):
    conv.weight.detach().numpy()[:] *= 2


def optimized(conv):
    conv(images()).square().sum().backward()
    torch.optim.SGD(conv.parameters(), lr=0.1).step()


def another_parameter(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


CHANGES = {
    "in place": lambda conv: torch.no_grad()(conv.weight.mul_)(2),
    "load_state_dict": lambda conv: conv.load_state_dict(layer(bias=True).double().state_dict()),
    "assigned": lambda conv: conv.load_state_dict(
        nn.Conv2d(32, 48, 3, padding=1).state_dict(), assign=True
    ),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "layout": lambda conv: conv.to(memory_format=torch.contiguous_format),
    **{
        f.__name__: f
        for f in (
            merged, merged_twice, averaged, one_filter, one_input_channel, by_numpy, optimized,
            another_parameter,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_has_changed_is_noticed(change):
    conv, x = layer(), images()
    assert_right(conv, x)
    for _ in range(3):
        CHANGES[change](conv)
        assert_right(conv, x)


LARGE = {
    "merged": lambda w: w.add_(torch.randn(len(w), 1).mm(torch.randn(1, w[0].numel())).view_as(w)),
    "a filter": lambda w: w[7].add_(1e-3),
    "an input channel": lambda w: w[:, 200].zero_(),
    "64 input channels": lambda w: w[:, 64:128].zero_(),
    "11 of 16 input channels": lambda w: w.unflatten(1, (-1, 16))[:, :, 5:].zero_(),
    "a tap": lambda w: w[:, :, 1, 1].neg_(),
    "a block": lambda w: w[96:128, 32:64].mul_(2),
    "the sign": lambda w: w.neg_(),
    "two filters": lambda w: w.copy_(w[[1, 0, *range(2, len(w))]]),
}


@pytest.mark.parametrize("shape", [(256, 256), (256, 512)], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("change", LARGE)
def test_a_large_weight_that_has_changed_is_noticed(change, layout, shape):
    """Of which not every number is compared, and which was written past its version."""
    out_channels, channels = shape
    conv, x = layer(channels, out_channels).to(memory_format=layout), images(channels, 1, 8)
    assert_right(conv, x)
    LARGE[change](conv.weight.data)
    assert_right(conv, x)


def test_a_number_that_was_changed_in_place_is_noticed():
    """By the version alone: of a weight of this size one run of 64 numbers in 32 is compared."""
    conv, x = layer(640, 640), images(640, 1, 4)
    assert_right(conv, x)
    draw = torch.Generator().manual_seed(0)
    for place in torch.randint(0, conv.weight.numel(), (40,), generator=draw).tolist():
        index = np.unravel_index(place, conv.weight.shape)
        with torch.no_grad():
            conv.weight[tuple(index)] += 1000
        assert_right(conv, x)


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("called", [torch.inference_mode, torch.no_grad])
def test_inference_mode(made, called):
    """ComfyUI makes its weights, which have no version then, and calls its models inside it."""
    with made():
        conv, x = layer(), images()
    with called():
        for change in (lambda: None, lambda: conv.weight.mul_(2), lambda: conv.weight[3].zero_()):
            with torch.inference_mode():
                change()
            assert_right(conv, x)
            assert laid_out(conv) is not None
    assert not laid_out(conv).winograd.is_inference()
    with torch.no_grad():
        assert_right(conv, x)


def test_gradients_after_inference_mode():
    conv, x = layer(), images()
    with torch.inference_mode():
        assert_right(conv, x)
    conv(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_training_on_small_images_gives_the_memory_back_too():
    conv, x = layer(), images(side=2)
    with torch.no_grad():
        assert convolved(conv, x) is None  # too small
    assert_right(conv, images())
    assert laid_out(conv).winograd is not None
    conv(x).sum().backward()
    assert laid_out(conv) is None


def test_training_gives_the_memory_back():
    conv, x = layer(), images()
    assert_right(conv, x)
    conv(x).sum().backward()
    assert laid_out(conv) is None
    assert_right(conv, x)
    assert laid_out(conv) is not None


def test_a_frozen_network_is_laid_out_with_gradients_enabled():
    conv = layer().requires_grad_(False)
    y = conv(images())
    assert laid_out(conv) is not None
    assert not y.requires_grad


def test_another_dtype_gives_the_memory_back():
    conv, x = layer(), images()
    assert_right(conv, x)
    with torch.no_grad():
        assert conv.double()(x.double()).dtype == torch.float64
    assert laid_out(conv) is None


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 32, 1, 1), (2, 1, 1, 1)])
def test_what_is_contiguous_too_stays_so(shape):
    """Of one channel or one pixel a tensor is in either layout."""
    conv = layer(shape[1], 16, padding=2).to(memory_format=torch.contiguous_format)
    x = torch.randn(shape)
    with torch.no_grad():
        assert conv(x).is_contiguous()
        assert_right(conv, x)
        last = torch.empty(shape, memory_format=torch.channels_last).copy_(x)
        torch.testing.assert_close(conv(last), conv(x), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_know_nothing_of_it():
    conv, x = layer(), images()
    assert_right(conv, x)
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert laid_out(twin) is None
        assert vars(twin).keys() == vars(conv).keys()
        assert_right(twin, x)
    count = len(kept_weights._kept)
    del conv, twin
    gc.collect()
    assert len(kept_weights._kept) < count


def test_little_memory(monkeypatch):
    monkeypatch.setattr(kept_weights, "memory_available", lambda: 0)
    conv, x = layer(), images()
    assert_right(conv, x)
    assert laid_out(conv) is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_weight_is_torchs_to_refuse():
    conv = layer(32, 0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="expected weight to be at least 1"):
        conv(images())


def test_weights_that_are_computed():
    conv, x = layer(), images()
    nn.utils.parametrizations.weight_norm(conv)
    assert_right(conv, x)
    assert laid_out(conv) is None


def test_where_it_does_not_serve():
    conv, x = layer(), images()
    with torch.no_grad():
        assert convolved(conv, x) is not None
        assert convolved(conv, x.contiguous()) is not None  # the weight is channels_last
        assert convolved(layer().to(memory_format=torch.contiguous_format), x.contiguous()) is None
        assert convolved(conv, x[0]) is None
        assert convolved(conv, x[:, :16]) is None
        assert convolved(conv, x.double()) is None
        with torch.autocast("cpu"):
            assert convolved(conv, x) is None
        with dx.use_backend("reference"):
            assert convolved(conv, x) is None
        with pytest.raises(RuntimeError, match="channels"):
            conv(x[:, :16].contiguous(memory_format=torch.channels_last))
    assert convolved(conv, x).requires_grad
    assert laid_out(conv) is None


@pytest.mark.parametrize("batch", [None, 8])
def test_the_algorithm_is_for_the_batch_that_is_planned(batch):
    conv = layer(256, 256)
    packed = PackedConv2d(conv.weight, padding=(1, 1), batch=batch)
    packed(images(256, 1, 4), None)
    assert (packed.winograd is not None) == (batch == 8)
    packed(images(256, 8, 4), None)
    assert (packed.winograd is not None, packed.direct is None) == (True, batch == 8)


@torch.no_grad()
def test_what_does_not_gain_is_torchs():
    for options, side, served in (
        ({"kernel_size": 1, "padding": 0}, 4, False),  # few products in all
        ({"kernel_size": 1, "padding": 0}, 64, True),
        ({}, 2, False),
        ({}, 16, True),  # by Winograd's algorithm
    ):
        conv, x = layer(256, 64, **options), images(256, 1, side)
        assert (convolved(conv, x) is not None) == served
        assert (laid_out(conv).direct is None) or served
        assert convolved(conv, x, residual=conv(x)) is not None  # which saves a pass


def test_memory_is_said():
    conv = layer()
    with torch.no_grad():
        conv(images())
    assert laid_out(conv).winograd.nbytes == filter_bytes(conv)
    conv = layer(kernel_size=1, padding=0)
    with torch.no_grad():
        conv(images(side=32))
    assert laid_out(conv).direct.nbytes == filter_bytes(conv)
    assert dx.fuse(nn.Sequential(layer(), layer())).filter_bytes == 2 * filter_bytes(layer())
