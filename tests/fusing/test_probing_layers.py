"""Activations and convolutions of other people's, known by what they compute; what is left."""

import copy

import pytest
import torch
from fused_models import fused_copy, ops_of
from test_fuse import pytestmark, vary  # noqa: F401
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import TIMED

IMAGES = (2, 8, 6, 5)

# --- activations ----------------------------------------------------------------------------------


class TimesSigmoid(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


class InSteps(nn.Module):
    def forward(self, value):
        gate = torch.sigmoid(value)
        return torch.mul(gate, value)


class WrittenOutMish(nn.Module):
    def forward(self, x):
        return x * torch.tanh(F.softplus(x))


class Scaled(nn.Module):
    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Idle(nn.Dropout):
    """Not torch's own: nobody knows what it does tomorrow."""


ACTIVATIONS = {
    "x.sigmoid()": TimesSigmoid,
    "in steps": InSteps,
    "torch's Mish": nn.Mish,
    "written out": WrittenOutMish,
    "beta 1": lambda: Scaled(1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_any_name_are_fused(name):
    x, act = torch.randn(IMAGES), ACTIVATIONS[name]()
    model = vary(nn.Sequential(nn.GroupNorm(2, 8), act))
    expected = model(x)
    assert dx.fuse(model).fused == [("0", f"with {type(act).__name__}")]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    ops = ops_of(lambda: model(x))
    assert ops.total() == ops["group_norm_act"] == 1


class Betas(nn.Module):
    """A SiLU until somebody says otherwise."""

    def forward(self, x):
        return x * torch.sigmoid(getattr(self, "beta", 1.0) * x)


def test_what_one_activation_is_says_nothing_of_another():
    model, other = (nn.Sequential(nn.GroupNorm(2, 8), Betas()) for _ in range(2))
    other[1].beta = 2.0
    assert dx.fuse(model).fused == [("0", "with Betas")]
    assert dx.fuse(other).fused == [("0", "alone")]
    x = torch.randn(IMAGES)
    model[1].beta = 2.0
    torch.testing.assert_close(model(x), model[1](model[0](x)))


def test_an_activation_of_another_dtype_is_left():
    class ToFloat32(nn.Module):
        def forward(self, x):
            return F.silu(x.float())

    model = nn.Sequential(nn.GroupNorm(2, 8), ToFloat32())
    assert dx.fuse(model).fused == [("0", "alone")]


def test_an_activation_that_changes_is_noticed():
    x, model = torch.randn(IMAGES), nn.Sequential(nn.GroupNorm(2, 8), Scaled(1.0))
    plain = copy.deepcopy(model)
    dx.fuse(model)
    for m in (model, plain):
        m[1].beta = 2.0
    assert dx.fuse(copy.deepcopy(plain)).fused == [("0", "alone")]
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("between", [nn.Identity, lambda: nn.Dropout(0.0), lambda: nn.Dropout(0.5)])
def test_what_hands_its_input_through_may_lie_between(between):
    x, model = torch.randn(IMAGES), nn.Sequential(nn.GroupNorm(2, 8), between(), nn.SiLU()).eval()
    expected = model(x)
    assert dx.fuse(model).fused == [("0", "with SiLU")]
    torch.testing.assert_close(model(x), expected)
    assert ops_of(lambda: model(x)).total() == 1
    if isinstance(model[1], nn.Dropout) and model[1].p:
        model.train()
        torch.manual_seed(0)
        dropped = model(x)
        dx.unfuse(model)
        torch.manual_seed(0)
        torch.testing.assert_close(dropped, model(x))
    else:
        model[1].register_forward_hook(lambda m, args, y: y + 1)
        assert not torch.allclose(model(x), expected)


def test_what_may_do_something_lies_between():
    model = nn.Sequential(nn.GroupNorm(2, 8), Idle(0.0), nn.SiLU())
    assert dx.fuse(model).fused == [("0", "alone")]


# --- convolutions ---------------------------------------------------------------------------------


class ConvOfInit(nn.Conv2d):
    def __init__(self, channels, out_channels):
        super().__init__(channels, out_channels, 3, padding=1)


class ConvWithLora(nn.Conv2d):  # in the manner of diffusers' of old
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = None

    def forward(self, x, scale=1.0):
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if self.lora is None else y + scale * self.lora(x)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class SamePadding(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Counting(nn.Conv2d):
    """With a state of its own."""

    def __init__(self):
        super().__init__(8, 8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


CONVOLUTIONS = {
    "only an __init__": lambda: ConvOfInit(16, 16),
    "with lora": lambda: ConvWithLora(16, 16, 3, stride=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_subclasses_are_ours(name):
    conv = CONVOLUTIONS[name]().to(memory_format=torch.channels_last)
    x = torch.randn(4, 16, 16, 16)
    expected = conv(x)
    fused, report = fused_copy(conv)
    assert report.convolutions == ["(model)"]
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
        assert ops_of(lambda: fused(x))["conv2d"] == TIMED


def test_arguments_and_attributes_of_a_subclass_are_its_own_matter():
    conv, x = (
        ConvWithLora(16, 16, 1).to(memory_format=torch.channels_last),
        torch.randn(2, 16, 4, 4),
    )
    fused, _ = fused_copy(conv)
    lora = nn.Conv2d(16, 16, 1)
    conv.lora = fused.lora = lora
    with torch.no_grad():
        torch.testing.assert_close(fused(x), conv(x))
        torch.testing.assert_close(fused(x, scale=0.5), conv(x, scale=0.5))


@pytest.mark.parametrize("cls", [Standardised, SamePadding, Counting])
def test_convolutions_that_compute_something_else_are_left(cls):
    conv = cls() if cls is Counting else cls(8, 8, 3)
    report = dx.fuse(conv)
    assert report.convolutions == []
    assert report.left == [("(model)", f"{cls.__name__}: computes something else than a Conv2d")]


# --- what is left ---------------------------------------------------------------------------------


class RMS(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=1)


class ChannelNorm(RMS):
    pass


def test_every_norm_and_convolution_that_is_left_is_named():
    model = nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 3), nn.ConvTranspose2d(4, 4, 2),
        nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4),
        nn.LayerNorm(4), ChannelNorm(), nn.Linear(4, 4), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    report = dx.fuse(model)
    assert report.left == [
        ("0", "Conv1d: torch's is as fast"),
        ("1", "torch's is as fast for such filters"),
        ("2", "ConvTranspose2d: no Conv2d or Conv3d"),
        ("3", "groups 2"),
        ("4", "padding 'same'"),
        ("5", "BatchNorm2d: no group norm"),
        ("6", "LayerNorm: no group norm"),
        ("7", "ChannelNorm: no group norm"),
    ]
    assert report.convolutions == ["9"]
    text = report.details()
    assert text.splitlines()[0] == "0 norms fused, 8 layers left as they were"
    for name, why in report.left:
        assert why in text
        assert name in text.split()
