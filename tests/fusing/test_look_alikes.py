"""Modules that look like what `fuse` knows, and are not quite that, or become something else."""

import copy

import pytest
import torch
from fused_models import ops_of
from test_fuse import pytestmark, vary  # noqa: F401
from test_modulated import Block
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import diffusion_ext as dx

IMAGES = (2, 16, 6, 5)


def assert_as_before(module, *inputs, change=lambda module: None, atol=1e-4):
    """Fused, and then changed, module computes what it does changed alone. Returns the report."""
    plain = copy.deepcopy(module)
    report = dx.fuse(module)
    change(plain), change(module)
    for mode in (False, True):
        for m in (plain, module):
            m.train(mode)
        torch.manual_seed(0)
        expected = plain(*inputs)
        torch.manual_seed(0)
        actual = module(*inputs)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)
    return report


# --- blocks ---------------------------------------------------------------------------------------


class Attending(Block):
    def _forward(self, x, emb):
        y = super()._forward(x, emb)
        return y + self.attend(y) if hasattr(self, "attend") else y


class Dropping(Block):
    def _forward(self, x, emb):
        return F.dropout(super()._forward(x, emb), 0.5, self.training)


def inputs():
    return torch.randn(2, 16, 8, 8), torch.randn(2, 6)


def test_a_block_with_more_in_it_than_the_one_before():
    blocks = [vary(Attending()), vary(Attending())]
    blocks[1].attend = nn.Conv2d(16, 16, 1)
    pair = nn.ModuleList(blocks)
    plain, (x, emb) = copy.deepcopy(pair), inputs()
    dx.fuse(pair)
    for ours, theirs in zip(pair, plain, strict=True):
        torch.testing.assert_close(ours(x, emb), theirs(x, emb), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_block_that_differs_in_training(scale_shift):
    assert_as_before(Dropping(scale_shift=scale_shift), *inputs(), atol=1e-3)


def test_a_block_with_dropout_is_fused_in_training_too():
    block = Block()
    block.out_layers[2] = nn.Dropout(0.3)
    report = assert_as_before(block.train(), *inputs(), atol=1e-3)
    assert "with Swish, embedding as scale and shift" in dict(report.fused).values()


def test_blocks_that_do_not_run_are_no_reason_to_fail():
    block = Block()
    block.in_layers[2] = nn.Conv2d(16, 16, 3, 2, 1)  # the skip does not fit
    dx.fuse(block)
    block = Block()
    block.emb_layers[1] = nn.LazyLinear(32)
    dx.fuse(block)


# --- convolutions ---------------------------------------------------------------------------------


def tiled(conv):
    """As makers of seamless textures do it."""

    def forward(x, weight, bias):
        return F.conv2d(F.pad(x, (1,) * 4, mode="circular"), weight, bias)

    conv._conv_forward = forward


@pytest.mark.parametrize("early", [True, False])
def test_a_convolution_whose_inner_forward_is_replaced(early):
    conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=torch.channels_last)
    if early:
        tiled(conv)
        assert dx.fuse(conv).convolutions == []
    else:
        with torch.no_grad():
            assert_as_before(conv, torch.randn(IMAGES), change=tiled)


class Masked(nn.Conv2d):
    def __init__(self):
        super().__init__(16, 16, 3, padding=1)
        self.register_buffer("mask", torch.ones(16, 16, 1, 1))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class Gained(nn.Conv2d):
    def __init__(self):
        super().__init__(16, 16, 3, padding=1)
        self.register_parameter("gain", None)

    def forward(self, x):
        y = super().forward(x)
        return y if self.gain is None else self.gain * y


def gain(module):
    module.gain = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("cls", "change"), [(Masked, lambda m: m.mask.zero_()), (Gained, gain)], ids=["mask", "gain"]
)
def test_a_convolution_with_more_than_a_weight(cls, change):
    conv = cls().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_as_before(conv, torch.randn(IMAGES), change=change)


def test_parametrizations_come_and_go():
    x = torch.randn(IMAGES)
    conv = parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
    expected = conv(x)
    assert ("(model)", "is parametrized") in dx.fuse(conv).left
    parametrize.remove_parametrizations(conv, "weight")
    torch.testing.assert_close(conv(x), expected)

    conv = nn.Conv2d(16, 16, 3, padding=1)
    dx.fuse(conv)
    parametrizations.weight_norm(conv)
    expected = conv(x)
    dx.unfuse(conv)
    torch.testing.assert_close(conv(x), expected)


# --- norms and activations ------------------------------------------------------------------------


class Caching(nn.GroupNorm):
    def __init__(self):
        super().__init__(4, 16)
        self.cache = {}

    def forward(self, x):
        if "weight" not in self.cache:
            self.cache["weight"] = self.weight.float()
        return F.group_norm(x, self.num_groups, self.cache["weight"], self.bias, self.eps)


class CountingNorm(nn.GroupNorm):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Detached(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.detach())


class OwnFormula(nn.GroupNorm):
    """Its eps is beside the deviation, not within."""

    def forward(self, x):
        groups = x.unflatten(1, (self.num_groups, -1)).flatten(2)
        centred = groups - groups.mean(2, keepdim=True)
        y = (centred / (groups.var(2, unbiased=False, keepdim=True).sqrt() + self.eps)).view_as(x)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


@pytest.mark.parametrize("cls", [CountingNorm, Detached, OwnFormula])
def test_norms_that_do_something_besides(cls):
    norm = vary(cls(4, 16))
    report = assert_as_before(norm, 1e-3 * torch.randn(IMAGES))
    assert report.fused == []


def test_a_cache_is_not_filled_by_a_probe():
    norm = vary(Caching())
    assert_as_before(norm, torch.randn(IMAGES))


def test_an_attribute_of_torchs_that_a_class_looks_at():
    class Affine(nn.GroupNorm):
        def forward(self, x):
            weight, bias = (self.weight, self.bias) if self.affine else (None, None)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

    norm = vary(Affine(4, 16))
    assert_as_before(norm, torch.randn(IMAGES), change=lambda m: setattr(m, "affine", False))


class Clamped(nn.Module):
    def forward(self, x):
        return x.clamp(0, 100)


class ByDimension(nn.Module):
    def forward(self, x):
        return F.silu(x) if x.dim() == 4 else F.relu(x)


class StraightThrough(nn.Module):
    def forward(self, x):
        return x + (F.relu(x) - x).detach()


class WithoutNaN(nn.Module):
    def forward(self, x):
        return F.silu(x).nan_to_num()


class CountingAct(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.silu(x)


class PerhapsSwish(nn.Module):
    def __init__(self, beta=None):
        super().__init__()
        if beta is not None:
            self.beta = nn.Parameter(torch.tensor(beta))

    def forward(self, x):
        return F.silu(x) if not hasattr(self, "beta") else x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize("cls", [Clamped, ByDimension, StraightThrough, WithoutNaN, CountingAct])
def test_activations_that_do_something_besides(cls):
    assert dx.fuse(nn.Sequential(nn.GroupNorm(2, 8), cls())).fused == [("0", "alone")]


def test_an_activation_with_a_parameter_is_another():
    model = nn.Sequential(
        nn.GroupNorm(4, 16), PerhapsSwish(), nn.GroupNorm(4, 16), PerhapsSwish(3.0)
    )
    report = assert_as_before(vary(model), torch.randn(IMAGES))
    assert report.fused == [("0", "with PerhapsSwish"), ("2", "alone")]


# --- how they are called --------------------------------------------------------------------------


def test_arguments_by_name():
    x = torch.randn(IMAGES)
    for module in (
        nn.GroupNorm(4, 16),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()),
    ):
        expected = module(input=x)
        dx.fuse(module)
        torch.testing.assert_close(module(input=x), expected)
    block, (x, emb) = vary(Block()), inputs()
    expected = block(x, emb=emb)
    dx.fuse(block)
    torch.testing.assert_close(block(x, emb=emb), expected)


@pytest.mark.compiles
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_subclasses_compile(backend):
    class Norm(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x.float()).type(x.dtype)

    class Conv(nn.Conv2d):
        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Conv(16, 16, 3, padding=1), Norm(4, 16), nn.SiLU())
    x = torch.randn(IMAGES)
    expected = model(x)
    dx.fuse(model)
    with dx.use_backend(backend):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [True, False])
def test_a_block_exports_with_a_batch_left_open(strict):
    block, (x, emb) = vary(Block()), inputs()
    expected = block(x, emb)
    dx.fuse(block)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"x": {0: batch}, "emb": {0: batch}}
    program = torch.export.export(block, (x, emb), dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(program.module()(x, emb), expected, rtol=1e-4, atol=1e-4)


def test_ops_serve_a_block_of_a_subclass_without_a_forward():
    class Same(Block):
        pass

    block, (x, emb) = vary(Same()), inputs()
    dx.fuse(block)
    assert ops_of(lambda: block(x, emb))["group_norm_act"] == 2
