"""The 3x3 convolutions of a fused model: which they are, and that they compute what they did."""

import pytest
import torch
from fused_models import assert_same_results, fused_copy, ops_of, results
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.nn.kept_weights import kept_of
from diffusion_ext.nn.winograd_conv2d import WinogradConv2d
from diffusion_ext.ops.conv2d import TIMED

PLAIN = {"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1}


def images(batch=4, layout=torch.channels_last):
    return torch.randn(batch, 16, 16, 16).to(memory_format=layout)


def network():
    convolutions = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1, bias=False)
    first, last = convolutions
    return nn.Sequential(first, nn.GroupNorm(4, 32), nn.SiLU(), last).to(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_results_and_gradients_are_those_of_the_original(layout):
    model, inputs = network(), [images(layout=layout)]
    fused, report = fused_copy(model)
    assert report.convolutions == ["0", "3"]
    assert "2 convolutions ours (0.211 MiB of filters)" in str(report)
    assert "\n" not in str(report)
    assert "2 convolutions of ours" in report.details()
    contiguous = dx.fuse(network().to(memory_format=torch.contiguous_format))
    assert ", 2 of them not in channels_last, 0 layers left" in str(contiguous)
    assert_same_results(results(fused, inputs), results(model, inputs), 1e-5)
    # What torch makes of a contiguous input with channels_last weights is channels_last.
    assert ops_of(lambda: fused(*inputs))["conv2d"] == (2 if TIMED else 0)


@pytest.mark.parametrize(
    "other",
    [
        {"padding": "same"},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "circular"},
    ],
    ids=str,
)
def test_other_convolutions_are_left(other):
    conv = nn.Conv2d(**(PLAIN | other))
    report, ((name, value),) = dx.fuse(conv), other.items()
    assert report.convolutions == []
    value = (value, value) if name == "dilation" else value
    assert report.left == [
        ("(model)", f"{name} {value!r}" if name == "padding" else f"{name} {value}")
    ]
    assert type(conv) is nn.Conv2d


def test_what_cannot_gain_is_left_and_said(measured_thresholds):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),  # sums of 27 products
        nn.Conv2d(16, 16, 3, padding=1),  # Winograd's
        nn.Conv2d(16, 255, 1), nn.Conv2d(255, 16, 1), nn.Conv2d(256, 16, 1),
    )  # fmt: skip
    why = "torch's is faster for so few channels"
    report = dx.fuse(model)
    assert report.left == [("0", why), ("2", why), ("3", why)]
    assert report.convolutions == ["1", "4"]
    assert type(model[0]) is nn.Conv2d
    assert "a call has enough work" in report.details()


@pytest.mark.parametrize(
    "other",
    [
        {"kernel_size": 1, "padding": 0},
        {"kernel_size": (3, 5), "padding": (1, 2)},
        {"kernel_size": 7, "padding": 3},
        {"stride": 2},
        {"padding": 0},
        {"in_channels": 3},
    ],
    ids=str,
)
def test_every_filter_without_gradients(other):
    torch.manual_seed(0)
    conv = nn.Conv2d(**(PLAIN | other)).to(memory_format=torch.channels_last)
    x = images()[:, : conv.in_channels].contiguous(memory_format=torch.channels_last)
    expected = conv(x)
    assert dx.fuse(conv).convolutions == ["(model)"]
    with torch.no_grad():
        assert ops_of(lambda: conv(x))["conv2d"] == TIMED
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    trained = conv(x)
    assert trained.requires_grad
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def test_subclasses_and_hooked_ones_are_left():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked, replaced = nn.Conv2d(**PLAIN), nn.Conv2d(**PLAIN)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    assert dx.fuse(nn.Sequential(Doubled(**PLAIN), hooked, replaced)).convolutions == []


def test_unfusing_gives_the_filters_memory_back():
    conv = nn.Conv2d(**PLAIN).to(memory_format=torch.channels_last)
    dx.fuse(conv)
    with torch.no_grad():
        conv(images())
    assert (kept_of(conv) is not None) == TIMED
    dx.unfuse(conv)
    assert kept_of(conv) is None


def test_a_network_that_has_them_keeps_them():
    model = dx.nn.ContextUnet(3, 16, 5, 8)
    dx.fuse(model)
    dx.unfuse(model)
    assert any(isinstance(m, WinogradConv2d) for m in model.modules())


def test_function_transforms_are_torchs():
    model, x = network(), images()
    alone = nn.Conv2d(**PLAIN)  # torch's GroupNorm asks vmap for what it does not have

    def transformed():
        gradient = torch.func.grad(lambda a: model(a).square().sum())
        return gradient(x), torch.func.vmap(alone)(x[None])[0]

    expected = transformed()
    dx.fuse(model)
    dx.fuse(alone)
    for actual, wanted in zip(transformed(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_sizes_left_open(strict):
    model, x = network(), images()
    expected = model(x)
    dx.fuse(model)
    sizes = {0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height", max=64)}
    program = torch.export.export(model, (x,), dynamic_shapes=[sizes], strict=strict).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    other = torch.randn(7, 16, 20, 16)
    expected = F.conv2d(other, model[0].weight, model[0].bias, padding=1)
    expected = model[3](F.silu(F.group_norm(expected, 4, model[1].weight, model[1].bias)))
    torch.testing.assert_close(program(other), expected, rtol=1e-4, atol=1e-5)
