"""A fused module returns what the module itself returns, in its strides too.

So what a program does with an output (a view of it, another convolution) goes on as before. Modules
and whole models, for inputs and weights of any strides, without gradients and with them.
"""

import copy
import random

import pytest
import torch
from fused_models import first_tensor, vary_gently
from strides import told, with_random_strides
from torch import nn

import diffusion_ext as dx

pytest.importorskip("diffusers")

from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models.controlnets.controlnet_sparsectrl import SparseControlNetModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

CASES = 40
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
RECORDED = pytest.mark.parametrize("recorded", [False, True], ids=["no grad", "grad"])


def norm_act_conv(channels, out_channels):
    norm = nn.GroupNorm(1, channels)
    return nn.Sequential(norm, nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))


def resnet_block(channels, out_channels):
    sizes = {"in_channels": channels, "out_channels": out_channels, "temb_channels": None}
    return ResnetBlock2D(**sizes, groups=1, groups_out=1)


def upsample(channels, out_channels):
    return Upsample2D(channels, use_conv=True, out_channels=out_channels)


def downsample(channels, out_channels):
    return Downsample2D(channels, use_conv=True, out_channels=out_channels)


# name -> module of (channels, out_channels)
MODULES = {
    "3x3": lambda c, k: nn.Conv2d(c, k, 3, padding=1),
    "3x3, stride 2": lambda c, k: nn.Conv2d(c, k, 3, padding=1, stride=2),
    "1x1": lambda c, k: nn.Conv2d(c, k, 1),
    "1x1, stride 2, no bias": lambda c, k: nn.Conv2d(c, k, 1, stride=2, bias=False),
    "5x2": lambda c, k: nn.Conv2d(c, k, (5, 2), padding=(2, 1)),
    "norm": lambda c, k: nn.GroupNorm(1, c),
    "norm, act": lambda c, k: nn.Sequential(nn.GroupNorm(1, c), nn.SiLU()),
    "norm, act, 3x3": norm_act_conv,
    "resnet block": resnet_block,
    "upsample": upsample,
    "downsample": downsample,
}
NORMS = {"norm", "norm, act", "norm, act, 3x3", "resnet block"}


@RECORDED
@LAYOUTS
@pytest.mark.parametrize("name", MODULES)
def test_a_module(name, layout, recorded):
    draw = random.Random(0)
    for _ in range(CASES):
        channels, out_channels = draw.choice([1, 3, 16]), draw.choice([1, 4, 16])
        plain = vary_gently(MODULES[name](channels, out_channels)).to(memory_format=layout)
        fused = copy.deepcopy(plain)
        dx.fuse(fused)
        spatial = [draw.choice([1, 2, 5, 8]) for _ in range(2)]
        x = with_random_strides(draw, [draw.choice([1, 1, 2, 3]), channels, *spatial])
        if name in NORMS and not (x.reshape(len(x), -1).std(1, correction=0) > 0.1).all():
            continue  # what is divided by a deviation of 0 is rounding, and torch refuses 1 number
        agree(plain, fused, [x, None] if name == "resnet block" else [x], recorded)


def agree(plain, fused, inputs, recorded, tolerance=1e-4, **options) -> None:
    """Outputs and gradients are of the same strides, and of nearly the same values."""
    results = []
    for model in (plain, fused):
        leaf = inputs[0].detach().requires_grad_(recorded)
        with torch.set_grad_enabled(recorded):
            outputs = tensors_of(model(leaf, *inputs[1:], **options))
        if recorded:
            sum(y.square().sum() for y in outputs).backward()
            outputs += [leaf.grad]
        results.append([y.detach() for y in outputs])
    for wanted, actual in zip(*results, strict=True):
        said = told(x=inputs[0], wanted=wanted, actual=actual)
        assert actual.stride() == wanted.stride(), said
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, msg=said)


def tensors_of(output) -> list[torch.Tensor]:
    """Every tensor of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors_of(value)]


def autoencoder():
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, **blocks)


def unet():
    return UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def sparse_control_net():
    return SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 16),
        motion_num_attention_heads=2,
    )


def with_fused(make, layout):
    torch.manual_seed(0)
    plain = vary_gently(make()).to(memory_format=layout)
    fused = copy.deepcopy(plain)
    dx.fuse(fused)
    return plain, fused


@LAYOUTS
@pytest.mark.parametrize("batch", [1, 2])
def test_an_autoencoder(layout, batch):
    plain, fused = with_fused(autoencoder, layout)
    draw = random.Random(batch)
    for _ in range(6):
        agree(plain.decode, fused.decode, [with_random_strides(draw, (batch, 4, 8, 8))], False)
        images = with_random_strides(draw, (batch, 3, 16, 16))
        with torch.no_grad():
            wanted, actual = (m.encode(images).latent_dist.mean for m in (plain, fused))
        assert actual.stride() == wanted.stride()


@LAYOUTS
@RECORDED
def test_a_unet(layout, recorded):
    plain, fused = with_fused(unet, layout)
    draw = random.Random(0)
    for batch in (1, 1, 1, 2, 2, 4):
        x = with_random_strides(draw, (batch, 3, 8, 8))
        agree(plain, fused, [x, torch.full((batch,), 7)], recorded, 1e-3)


@LAYOUTS
@pytest.mark.parametrize("batch", [1, 4])
def test_a_sparse_control_net(layout, batch):
    plain, fused = with_fused(sparse_control_net, layout)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if "controlnet" in name:  # begins as zeros
                nn.init.constant_(parameter, 0.1)
    draw = random.Random(batch)
    for frames in (1, 1, 2, 2):
        x, condition = (with_random_strides(draw, (batch, 4, frames, 8, 8)) for _ in range(2))
        text = torch.randn(batch * frames, 3, 8)
        options = {"conditioning_mask": torch.ones(batch, 1, frames, 8, 8)}
        agree(plain, fused, [x, 7, text, condition], False, 1e-3, **options)


def test_the_views_that_torch_allows():
    """Of a picture's rows, and of what an autoencoder decodes: both were reported."""
    vae, conv = autoencoder().eval(), nn.Conv2d(3, 16, 3, padding=1)
    for module in (conv, vae):
        dx.fuse(module)
    picture = torch.rand(32, 32, 3).permute(2, 0, 1)[None]
    with torch.no_grad():
        plain = nn.functional.conv2d(picture, conv.weight, conv.bias, padding=1)
        assert conv(picture).stride() == plain.stride()
        first_tensor(vae.decode(torch.randn(1, 4, 8, 8))).view(1, -1)
