"""Adaptive norms and residual blocks with an embedding, in the manner of other people's code."""

import copy
import pickle
import re

import pytest
import torch
from fused_models import assert_same_results, fused_copy, ops_of, results
from test_fuse import GroupNorm32, Swish, pytestmark, vary  # noqa: F401
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import diffusion_ext as dx
from diffusion_ext.ops.conv2d import TIMED

normalization = pytest.importorskip("diffusers.models.normalization")


class MappedNorm(nn.Module):  # in the manner of k-diffusion's
    def __init__(self, channels, features=6, groups=4, cond_key="cond"):
        super().__init__()
        self.num_groups, self.eps, self.cond_key = groups, 1e-5, cond_key
        self.mapper = nn.Linear(features, 2 * channels)

    def forward(self, x, cond):
        weight, bias = self.mapper(cond[self.cond_key])[..., None, None].chunk(2, dim=1)
        return torch.addcmul(bias, F.group_norm(x, self.num_groups, eps=self.eps), weight + 1)


class PlainMappedNorm(MappedNorm):
    """Something else: the weight is not beside 1."""

    def forward(self, x, cond):
        weight, bias = self.mapper(cond[self.cond_key])[..., None, None].chunk(2, dim=1)
        return torch.addcmul(bias, F.group_norm(x, self.num_groups, eps=self.eps), weight)


def diffusers_norm(act="silu"):
    return normalization.AdaGroupNorm(6, 8, 4, act)


NORMS = {
    "diffusers": (diffusers_norm, lambda emb: emb),
    "diffusers without an activation": (lambda: diffusers_norm(None), lambda emb: emb),
    "k-diffusion": (lambda: MappedNorm(8), lambda emb: {"cond": emb}),
}


@pytest.mark.parametrize("name", NORMS)
def test_adaptive_norms_are_one_op(name):
    build, wrapped = NORMS[name]
    norm = vary(build())
    x, emb = torch.randn(3, 8, 6, 5), wrapped(torch.randn(3, 6))
    expected = norm(x, emb)
    assert dx.fuse(norm).fused == [("(model)", "alone, modulated")]
    torch.testing.assert_close(norm(x, emb), expected, rtol=1e-5, atol=1e-5)
    ops = ops_of(lambda: norm(x, emb))
    assert (ops["group_norm_act"], ops["native_group_norm"]) == (1, 0)
    norm(x, emb).sum().backward()
    assert all(p.grad is not None for p in norm.parameters())
    dx.unfuse(norm)
    assert torch.equal(norm(x, emb), expected)


def test_other_adaptive_norms_are_left_and_named():
    norm = PlainMappedNorm(8)
    assert dx.fuse(norm).left == [("(model)", "PlainMappedNorm: no group norm")]


class Block(nn.Module):  # in the manner of guided-diffusion's
    use_checkpoint = False

    def __init__(
        self, channels=16, out=16, features=6, scale_shift=True, up=False, norm=GroupNorm32
    ):
        super().__init__()
        self.use_scale_shift_norm, self.updown = scale_shift, up
        convs = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.in_layers = nn.Sequential(norm(4, channels), Swish(), convs[0])
        self.h_upd = self.x_upd = nn.Upsample(scale_factor=2) if up else nn.Identity()
        rows = 2 * out if scale_shift else out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(features, rows))
        self.out_layers = nn.Sequential(norm(4, out), Swish(), nn.Dropout(0.0), convs[1])
        self.skip_connection = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        if self.updown:
            rest, conv = self.in_layers[:-1], self.in_layers[-1]
            h, x = self.h_upd(rest(x)), self.x_upd(x)
            h = conv(h)
        else:
            h = self.in_layers(x)
        rows = self.emb_layers(emb).type(h.dtype)[..., None, None]
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(rows, 2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + rows)
        return self.skip_connection(x) + h


class HalvedBlock(Block):
    def _forward(self, x, emb):
        return super()._forward(x, emb) / 2


BLOCKS = {
    "scale and shift": {},
    "shift": {"scale_shift": False},
    "other channels": {"out": 32},
    "up": {"up": True},
    "torch's norm": {"norm": nn.GroupNorm},
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_blocks_are_fused_with_their_embedding(name, layout):
    block = vary(Block(**BLOCKS[name])).to(memory_format=layout)
    inputs = [torch.randn(2, 16, 8, 8).to(memory_format=layout), torch.randn(2, 6)]
    fused, report = fused_copy(block)
    how = "scale and shift" if block.use_scale_shift_norm else "shift"
    assert dict(report.fused) == {
        "in_layers.0": "with Swish",
        "out_layers.0": f"with Swish, embedding as {how}",
    }
    assert_same_results(results(fused, inputs), results(block, inputs), 1e-5)
    with torch.no_grad():
        y, expected = fused(*inputs), block(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert y.stride() == expected.stride()
    ops = ops_of(lambda: fused(*inputs))
    assert ops["group_norm_act"] == 2
    assert not ops.keys() & {"native_group_norm", "sigmoid"}
    if layout == torch.channels_last and TIMED:
        assert ops["convolution"] == 0
    assert dx.fuse(fused).details() == report.details()
    dx.unfuse(fused)
    with torch.no_grad():
        assert torch.equal(fused(*inputs), expected)


@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_block_that_computes_something_else_is_not_taken(scale_shift):
    block, inputs = (
        vary(HalvedBlock(scale_shift=scale_shift)),
        [torch.randn(2, 16, 8, 8), torch.randn(2, 6)],
    )
    expected = block(*inputs)
    report = dict(dx.fuse(block).fused)
    alone = "alone: its block takes it out of its Sequential"
    assert report["out_layers.0"] == (alone if scale_shift else "with Swish")
    torch.testing.assert_close(block(*inputs), expected, rtol=1e-4, atol=1e-5)


class ScaledBlock(Block):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def _forward(self, x, emb):
        return self.scale * super()._forward(x, emb)


def test_blocks_of_a_class_are_known_by_their_attributes():
    blocks = nn.ModuleList(vary(ScaledBlock(scale)) for scale in (1.0, 0.5))
    inputs = torch.randn(2, 16, 8, 8), torch.randn(2, 6)
    expected = [block(*inputs) for block in blocks]
    report = dict(dx.fuse(blocks).fused)
    assert report["0.out_layers.0"] == "with Swish, embedding as scale and shift"
    assert report["1.out_layers.0"] == "alone: its block takes it out of its Sequential"
    for block, y in zip(blocks, expected, strict=True):
        torch.testing.assert_close(block(*inputs), y, rtol=1e-4, atol=1e-4)


def test_probing_a_block_leaves_no_trace():
    block, called = Block(out=32), []
    block.skip_connection = nn.Sequential(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32))
    block.skip_connection[1].register_forward_hook(lambda *_: called.append(1))
    state = copy.deepcopy(block.state_dict())
    dx.fuse(block.train())
    assert not called
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())


def test_a_hooked_adaptive_norm_is_named_so():
    norm = diffusers_norm()
    norm.register_forward_hook(lambda *_: None)
    assert dx.fuse(norm).left == [("(model)", "has hooks")]


def test_unusual_calls_are_the_blocks_own():
    block, x = vary(Block()), torch.randn(2, 16, 8, 8)
    plain = copy.deepcopy(block)
    dx.fuse(block)
    for emb in (torch.randn(1, 6), torch.randn(2, 6)):
        torch.testing.assert_close(block(x, emb), plain(x, emb), rtol=1e-4, atol=1e-5)
    emb = torch.randn(2, 6)
    for b in (block, plain):
        b.use_checkpoint = True
    torch.testing.assert_close(block(x, emb), plain(x, emb), rtol=1e-4, atol=1e-5)
    for b in (block, plain):
        b.use_scale_shift_norm, b.use_checkpoint = False, False
    with pytest.raises(RuntimeError) as theirs:
        plain(x, emb)
    with pytest.raises(RuntimeError, match=re.escape(str(theirs.value))):
        block(x, emb)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:torch")
@pytest.mark.parametrize("build", [Block, lambda: Block(scale_shift=False), diffusers_norm])
def test_traced_while_gradients_are_recorded(build):
    model = vary(build())
    channels = 8 if isinstance(model, normalization.AdaGroupNorm) else 16
    inputs = torch.randn(2, channels, 8, 8), torch.randn(2, 6)
    expected = model(*inputs)
    dx.fuse(model)
    traced = torch.jit.trace(model, inputs)  # raises if a second trace differs
    torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_hooks_in_a_block_see_what_they_saw():
    for place in ("out_layers.0", "out_layers.1", "out_layers.3", "skip_connection"):
        block, x, emb, seen = vary(Block()), torch.randn(2, 16, 8, 8), torch.randn(2, 6), []
        dx.fuse(block)
        block.get_submodule(place).register_forward_hook(
            lambda m, args, y, seen=seen: seen.append(y)
        )
        block(x, emb)
        dx.unfuse(block)
        block(x, emb)
        torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("build", [Block, diffusers_norm])
def test_copies_stay_fused(copied, build):
    model = vary(build())
    channels = 8 if isinstance(model, normalization.AdaGroupNorm) else 16
    inputs = torch.randn(2, channels, 8, 8), torch.randn(2, 6)
    dx.fuse(model)
    twin = copied(model)
    served = ops_of(lambda: model(*inputs))["group_norm_act"]
    assert ops_of(lambda: twin(*inputs))["group_norm_act"] == served > 0
    torch.testing.assert_close(twin(*inputs), model(*inputs))
