"""Upsampling whose convolution reads the smaller images in place."""

import pytest
import torch
from fused_models import ops_of

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import TIMED

pytest.importorskip("diffusers")
from diffusers.models.upsampling import Upsample2D

CHANNELS = 16


def images(batch=2, channels=CHANNELS):
    return torch.randn(batch, channels, 6, 5).to(memory_format=torch.channels_last)


def pair(**options):
    """An Upsample2D, and one of the same weights that is fused."""
    plain = Upsample2D(CHANNELS, **options).to(memory_format=torch.channels_last).eval()
    fused = Upsample2D(CHANNELS, **options).to(memory_format=torch.channels_last).eval()
    fused.load_state_dict(plain.state_dict())
    dx.fuse(fused)
    return plain, fused


@torch.no_grad()
@pytest.mark.parametrize("name", ["conv", "op"])
@pytest.mark.parametrize("batch", [2, 64])  # from 64 on diffusers makes it contiguous
def test_reads_in_place(name, batch):
    plain, fused = pair(use_conv=True, name=name, out_channels=24)
    x = images(batch)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)
    assert fused(x).stride() == plain(x).stride()
    for model in (plain, fused):
        model.to(memory_format=torch.contiguous_format)
    assert fused(x).stride() == plain(x).stride()
    for model in (plain, fused):
        model.to(memory_format=torch.channels_last)
    ops = ops_of(lambda: fused(x))
    assert ops["conv2d"] == TIMED
    assert bool(ops["upsample_nearest2d"]) != TIMED


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_conv_transpose": True},
        {"use_conv": True, "interpolate": False},
        {"use_conv": True, "norm_type": "rms_norm", "eps": 1e-5, "elementwise_affine": True},
        {"use_conv": True, "kernel_size": 5, "padding": 2},
    ],
    ids=str,
)
def test_other_kinds(options):
    plain, fused = pair(**options)
    x = images()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_unusual_is_diffusers():
    plain, fused = pair(use_conv=True)
    x = images()
    for options in ({"output_size": (12, 11)}, {"output_size": (9, 9)}):
        torch.testing.assert_close(fused(x, **options), plain(x, **options), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        fused(images(channels=8))
    seen = []
    fused.conv.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    fused(x)
    assert seen == [(2, CHANNELS, 12, 10)]
    dx.unfuse(fused)
    assert type(fused) is Upsample2D


def test_gradients():
    plain, fused = pair(use_conv=True)
    x = images().requires_grad_()
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (plain, fused)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
