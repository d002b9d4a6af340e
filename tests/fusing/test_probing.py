"""Norms of other people's, in the manner of their code, known by what they compute."""

import copy
import pickle

import pytest
import torch
from fused_models import ops_of
from test_fuse import pytestmark, vary  # noqa: F401
from test_probing_layers import Counting, TimesSigmoid
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx

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
