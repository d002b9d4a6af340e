"""Modules of other people's, in the manner of their code, known by what they compute."""

import copy
import pickle

import pytest
import torch
from fused_models import fused_copy, ops_of
from test_fuse import pytestmark, vary  # noqa: F401
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import VECTORISED

# --- norms ----------------------------------------------------------------------------------------


class OnlyAnInit(nn.GroupNorm):
    def __init__(self, channels, groups=4):
        super().__init__(groups, channels, eps=1e-6)


class OneGroup(nn.GroupNorm):  # in the manner of timm's
    def __init__(self, channels):
        super().__init__(1, channels)
        self.fast_norm = False

    def forward(self, x):
        if self.fast_norm:
            return x
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class WithActivation(nn.GroupNorm):
    def __init__(self, channels, groups=4, act=nn.ReLU):
        super().__init__(groups, channels)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class InFloat32(nn.GroupNorm):  # in the manner of kohya's and karlo's
    def __init__(self, channels, groups=4, swish=0):
        super().__init__(groups, channels)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x.float()).to(x.dtype)
        if self.swish == 1:
            y = F.silu(y)
        elif self.swish:
            y = y * F.sigmoid(y * float(self.swish))
        return y


class Casting:  # in the manner of ComfyUI's
    cast_weights = False
    weight_function = []  # noqa: RUF012


class Switched(nn.GroupNorm, Casting):
    def forward(self, *args, **kwargs):
        if self.cast_weights or self.weight_function:
            y = super().forward(*args, **kwargs)
            for f in self.weight_function:
                y = f(y)
            return 3 * y if self.cast_weights else y
        return super().forward(*args, **kwargs)


class NoSubclass(nn.Module):  # in the manner of EDM's
    def __init__(self, channels):
        super().__init__()
        self.num_groups, self.eps = 4, 1e-5
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class ByFrame(nn.GroupNorm):  # in the manner of AnimateDiff's
    def forward(self, x):
        batch, channels, frames, *size = x.shape
        y = super().forward(x.transpose(1, 2).reshape(-1, channels, *size))
        return y.reshape(batch, frames, channels, *size).transpose(1, 2)


class Learned(nn.GroupNorm):
    """Not a group norm: its weight is beside 1."""

    def forward(self, x):
        return F.group_norm(x, self.num_groups, 1 + self.weight, self.bias, self.eps)


class Noisy(nn.GroupNorm):
    """One while it evaluates alone."""

    def forward(self, x):
        return super().forward(x + torch.rand_like(x) if self.training else x)


class ToFloat32(nn.GroupNorm):
    """One, but of another dtype than its input."""

    def forward(self, x):
        return super().forward(x.float())


class OwnEps(nn.GroupNorm):
    """Its eps is another than it says."""

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, 1e-3)


IMAGES, VIDEO = (2, 8, 6, 5), (2, 8, 3, 6, 5)
NORMS = {
    "only an __init__": (lambda: OnlyAnInit(8), IMAGES),
    "one group": (lambda: OneGroup(8), IMAGES),
    "with ReLU": (lambda: WithActivation(8), IMAGES),
    "with SiLU in place": (lambda: WithActivation(8, act=lambda: nn.SiLU(inplace=True)), IMAGES),
    "in float32": (lambda: InFloat32(8), IMAGES),
    "in float32 with swish": (lambda: InFloat32(8, swish=1), IMAGES),
    "switched": (lambda: Switched(4, 8), IMAGES),
    "no subclass": (lambda: NoSubclass(8), IMAGES),
    "by frame": (lambda: ByFrame(4, 8), VIDEO),
    "of volumes": (lambda: OnlyAnInit(8), VIDEO),
    "of sequences": (lambda: OnlyAnInit(8), (2, 8, 9)),
}
OTHERS = {
    "another activation": lambda: WithActivation(8, act=nn.Softplus),
    "another swish": lambda: InFloat32(8, swish=1.7),
    "an activation with a bound": lambda: WithActivation(8, act=nn.ReLU6),
    "another eps": lambda: OwnEps(4, 8),
    "learned": lambda: Learned(4, 8),
    "noisy": lambda: Noisy(4, 8),
    "to float32": lambda: ToFloat32(4, 8),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norms_of_any_class_are_fused(name, dtype, layout):
    build, shape = NORMS[name]
    norm, x = vary(build()), torch.randn(shape)
    if layout == "channels_last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = norm(x.to(dtype))
    report = dx.fuse(norm)
    assert len(report.fused) == 1
    assert report.left == []
    ops = ops_of(lambda: norm(x.to(dtype)))
    assert (ops["group_norm_act"], ops["native_group_norm"]) == (1, 0)
    y = norm(x.to(dtype))
    assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    dx.unfuse(norm)
    assert torch.equal(norm(x.to(dtype)), expected)


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_left_and_named(name):
    norm = OTHERS[name]()
    report = dx.fuse(norm)
    assert report.fused == []
    ((_, why),) = [left for left in report.left if left[0] == "(model)"]
    assert why == f"{type(norm).__name__}: computes something else than a group norm"


def test_probing_leaves_no_trace():
    norms = [vary(build()) for build, _ in NORMS.values()]
    model, called = nn.Sequential(*norms, nn.GroupNorm(2, 8), TimesSigmoid(), Counting()), []
    for module in (model[-2], model[list(NORMS).index("with ReLU")].act):
        module.register_forward_hook(lambda *_: called.append(1))
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    dx.fuse(model)
    assert torch.equal(torch.rand(3), drawn)
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(p.grad is not None for p in model.parameters())
    assert not called


def test_probing_leaves_the_seeds_of_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("was seeded"))
    assert len(dx.fuse(OnlyAnInit(8)).fused) == 1


def test_probing_in_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = nn.Sequential(OnlyAnInit(8), TimesSigmoid())
        assert dx.fuse(model).fused == [("0", "with TimesSigmoid")]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_module_whose_configuration_changes_computes_as_its_class_does():
    x = torch.randn(IMAGES)
    changes = {
        "an attribute of the class": (Switched(4, 8), lambda m: setattr(m, "cast_weights", True)),
        "a list": (Switched(4, 8), lambda m: setattr(m, "weight_function", [torch.neg])),
        "its own attribute": (OneGroup(8), lambda m: setattr(m, "fast_norm", True)),
        "a child": (WithActivation(8), lambda m: setattr(m, "act", nn.Tanh())),
        "a tensor": (InFloat32(8, swish=1), lambda m: setattr(m, "swish", torch.tensor(2.0))),
        "a child's class": (InFloat32(8, swish=1), lambda m: setattr(m, "swish", 1.5)),
    }
    for what, (norm, change) in changes.items():
        plain = copy.deepcopy(norm)
        dx.fuse(norm)
        torch.testing.assert_close(norm(x), plain(x))
        change(norm), change(plain)
        assert torch.equal(norm(x), plain(x)), what


def test_a_list_that_grows_in_place_is_noticed():
    x, norm = torch.randn(IMAGES), Switched(4, 8)
    norm.weight_function = []
    dx.fuse(norm)
    before = norm(x)
    norm.weight_function.append(torch.neg)
    torch.testing.assert_close(norm(x), -before)


def test_hooks_on_a_norms_own_activation_see_what_they_saw():
    act = nn.Sequential(nn.Identity(), nn.ReLU())
    norm, x, seen = WithActivation(8, act=lambda: act), torch.randn(IMAGES), []
    assert dx.fuse(norm).fused == [("(model)", "with its relu")]
    norm.act[1].register_forward_hook(lambda m, args, y: seen.append(args[0].min()))
    norm(x)
    assert seen[0] < 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused(copied):
    norm, x = WithActivation(8), torch.randn(IMAGES)
    dx.fuse(norm)
    twin = copied(norm)
    assert ops_of(lambda: twin(x))["group_norm_act"] == 1
    torch.testing.assert_close(twin(x), norm(x))


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
        assert ops_of(lambda: fused(x))["conv2d"] == VECTORISED


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
        nn.Conv1d(4, 4, 3), nn.Conv3d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2),
        nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4),
        nn.LayerNorm(4), ChannelNorm(), nn.Linear(4, 4), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    report = dx.fuse(model)
    assert report.left == [
        ("0", "Conv1d: torch's is as fast"),
        ("1", "Conv3d: no Conv2d"),
        ("2", "ConvTranspose2d: no Conv2d"),
        ("3", "groups 2"),
        ("4", "padding 'same'"),
        ("5", "BatchNorm2d: no group norm"),
        ("6", "LayerNorm: no group norm"),
        ("7", "ChannelNorm: no group norm"),
    ]
    assert report.convolutions == ["9"]
    assert str(report).splitlines()[0] == "0 fused, 8 left as they were"
    for name, why in report.left:
        assert why in str(report)
        assert name in str(report).split()
