"""Fused networks in bfloat16 and float16 on the CPU: their convolutions and linear layers are ours
where torch's are slow, and round no more than torch's do."""

import copy

import pytest
import torch
from fused_models import ops_of, vary_gently
from torch import nn

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import SHARES_OF_TORCH, TIMED

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def unet():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, [torch.randn(2, 3, 16, 16), torch.tensor(300)]


def decoder():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return model.decoder, [torch.randn(1, 4, 16, 16)]


def transformer():
    blocks = pytest.importorskip("diffusers.models.attention")
    block = blocks.BasicTransformerBlock(64, 4, 16, activation_fn="geglu")
    return block, [torch.randn(2, 40, 64)]


def moving():
    layers = nn.Conv3d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv3d(32, 3, 1)
    return nn.Sequential(*layers), [torch.randn(1, 16, 5, 12, 12)]


# Each network, and which op of ours it calls.
NETWORKS = {unet: "conv2d", decoder: "conv2d", transformer: "linear", moving: "conv3d"}


def as_dtype(inputs, dtype):
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


def output(model, inputs):
    y = model(*inputs)
    return y if isinstance(y, torch.Tensor) else y[0]


@torch.no_grad()
@HALVES
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_a_network(make, dtype):
    torch.manual_seed(0)
    model, inputs = make()
    model = vary_gently(model).to(dtype)
    if make in (unet, decoder):
        model = model.to(memory_format=torch.channels_last)
    halves, fused = as_dtype(inputs, dtype), copy.deepcopy(model)
    exact = output(copy.deepcopy(model).double(), as_dtype(halves, torch.float64))
    expected = output(model, halves)
    dx.fuse(fused)
    y = output(fused, halves)
    assert y.dtype == dtype
    assert y.stride() == expected.stride()
    error, torchs = ((t.double() - exact).square().mean().sqrt() for t in (y, expected))
    assert error <= 1.1 * torchs
    assert (ops_of(lambda: fused(*halves))[NETWORKS[make]] > 0) == TIMED

    dx.unfuse(fused)
    assert torch.equal(output(fused, halves), expected)


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(32, 32, 3, padding=1), (2, 32, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(32, 32, 3, padding=1), (1, 32, 3, 9, 9)),
    "linear": (lambda: nn.Linear(64, 48), (5, 64)),
}


@torch.no_grad()
@HALVES
@pytest.mark.parametrize("op", LAYERS)
def test_changes_of_the_weights_are_seen(op, dtype):
    make, shape = LAYERS[op]
    layer, x = make().to(dtype), torch.randn(shape).to(dtype)
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    x = x.contiguous(memory_format=layout or torch.contiguous_format)
    dx.fuse(layer)
    assert ops_of(lambda: layer(x))[op] == TIMED
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.view(torch.int16).bitwise_xor_(1),  # past the version
        lambda: layer.bias.data.add_(1),
        lambda: layer.float(),
        lambda: layer.to(dtype),
    ):
        change()
        given = x.to(layer.weight.dtype)
        y, plain = layer(given), copy.deepcopy(layer).double()
        dx.unfuse(plain)
        exact = plain(given.double())
        assert (y - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert y.dtype == given.dtype
        assert ops_of(lambda given=given: layer(given))[op] == TIMED


@torch.no_grad()
@HALVES
@pytest.mark.parametrize("op", LAYERS)
def test_two_dtypes_are_torchs_error(op, dtype):
    make, shape = LAYERS[op]
    layer, x = make(), torch.randn(shape).to(dtype)
    with pytest.raises(RuntimeError) as expected:
        layer(x)
    dx.fuse(layer)
    with pytest.raises(RuntimeError) as raised:
        layer(x)
    assert str(raised.value) == str(expected.value)


@torch.no_grad()
@pytest.mark.parametrize("share", [None, 1 / 2], ids=["slow", "fast"])
def test_what_the_processor_multiplies_itself_is_torchs(measured_thresholds, monkeypatch, share):
    """Then ours gain by Winograd's algorithm, and of few pixels or rows; else everywhere."""
    monkeypatch.delitem(SHARES_OF_TORCH, torch.bfloat16, raising=False)
    if share is not None:
        monkeypatch.setitem(SHARES_OF_TORCH, torch.bfloat16, share)
    winograds, single = nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 256, 1)
    layers = nn.ModuleList((winograds, single, nn.Linear(256, 256))).bfloat16()
    dx.fuse(layers)
    layer = layers[2]
    for module, shape, gains in (
        (winograds, (1, 256, 32, 32), True),
        (winograds, (1, 256, 2, 2), True),
        (single, (1, 256, 32, 32), share is None),
        (single, (1, 256, 2, 2), True),
        (layer, (2, 200, 256), share is None),
        (layer, (2, 4, 256), True),
    ):
        x = torch.randn(shape).bfloat16()
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        counts = ops_of(lambda module=module, x=x: module(x))
        assert counts["conv2d"] + counts["linear"] == (gains and TIMED)


@torch.no_grad()
def test_rows_of_other_strides_are_copied_where_torch_is_slow():
    layer, x = nn.Linear(32, 48).bfloat16(), torch.randn(2, 32, 9).bfloat16().transpose(1, 2)
    expected = layer(x)
    dx.fuse(layer)
    assert ops_of(lambda: layer(x))["linear"] == TIMED
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
    assert layer(x).stride() == expected.stride()
