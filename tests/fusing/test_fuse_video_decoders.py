"""diffusers' video autoencoders, whose decoders' time is Conv3d's, before and after `fuse`."""

import pytest
import torch
from fused_models import identity_of, ops_of, vary_gently

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import TIMED

diffusers = pytest.importorskip("diffusers")

WIDTHS = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1}


def cogvideox():
    return diffusers.AutoencoderKLCogVideoX(**WIDTHS, latent_channels=16, norm_num_groups=4)


def hunyuan_video():
    return diffusers.AutoencoderKLHunyuanVideo(**WIDTHS, latent_channels=16, norm_num_groups=4)


def wan():
    return diffusers.AutoencoderKLWan(base_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1)


def ltx():
    widths, layers = (16, 16, 32, 32), (1,) * 5
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=16, block_out_channels=widths, decoder_block_out_channels=widths,
        layers_per_block=layers, decoder_layers_per_block=layers,
    )  # fmt: skip


def mochi():
    widths = (32, 32, 64, 64)  # of 32 groups
    return diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        layers_per_block=(1,) * 5,
    )  # fmt: skip


# Each, and how many of a decoder's convolutions ours serve at least.
DECODERS = {cogvideox: 15, hunyuan_video: 15, wan: 15, ltx: 10, mochi: 8}


@torch.no_grad()
@pytest.mark.parametrize("make", DECODERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_decoder(make, frames):
    torch.manual_seed(0)
    model = vary_gently(make())
    latents = torch.randn(1, 12 if make is mochi else 16, frames, 6, 4)
    expected, before = model.decode(latents).sample, identity_of(model)
    types = [type(m) for m in model.modules()]

    report = dx.fuse(model)
    assert len(report.convolutions) >= DECODERS[make]
    y = model.decode(latents).sample
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert y.stride() == expected.stride()
    served = ops_of(lambda: model.decode(latents))["conv3d"]
    assert served >= DECODERS[make] if TIMED else served == 0
    assert identity_of(model) == before

    dx.unfuse(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model.decode(latents).sample, expected)
