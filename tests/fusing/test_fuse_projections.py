"""The first halves of feed-forwards: projections with their activation or their gate."""

import pytest
import torch
from fused_models import GEGLU, assert_same_results, fused_copy, geglu, ops_of, results, rows
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.fusing.feed_forward import FusedProjection
from diffusion_ext.fusing.modules import FusedLinear
from diffusion_ext.ops.conv2d import TIMED


class Backwards(GEGLU):
    """The gate first, which is not ours."""

    def forward(self, x):
        gate, x = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


FORMS = {
    "geglu": ("gelu", True),
    "gelu": ("gelu", False),
    "gelu-approximate": ("gelu_tanh", False),
    "swiglu": ("silu", True),
    "linear-silu": ("silu", False),
}


def feed_forward(kind, **options):
    attention = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    return attention.FeedForward(48, activation_fn=kind, **options).eval()


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_feed_forward_of_diffusers(kind, bias):
    model, x = feed_forward(kind, bias=bias), rows()
    twin, report = fused_copy(model)
    assert report.linears == ["net.0.proj", "net.2"]
    assert twin.net[0].form == FORMS[kind]
    assert_same_results(results(twin, [x]), results(model, [x]), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)
        names = ops_of(lambda: twin(x))
    assert not TIMED or names.keys() <= {"linear", "detach", "view", "alias"}
    dx.unfuse(twin)
    assert vars(twin.net[0]).keys() == vars(model.net[0]).keys()


def test_the_approximation_that_is_none_of_ours():
    model = feed_forward("geglu-approximate")
    dx.fuse(model)
    assert not isinstance(model.net[0], FusedProjection)
    assert isinstance(model.net[0].proj, FusedLinear)


def test_what_looks_like_one():
    model = nn.Sequential(geglu(), Backwards(24, 24))
    x = rows()
    expected = model(x)
    dx.fuse(model)
    assert isinstance(model[0], FusedProjection)
    assert not isinstance(model[1], FusedProjection)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_dropout_still_drops():
    model = feed_forward("geglu", dropout=0.5).train()
    dx.fuse(model)
    with torch.no_grad():
        assert (model.net[1](model.net[0](rows())) == 0).float().mean() > 0.3


@pytest.mark.parametrize("change", ["hook", "activation", "layer", "replaced", "hook within"])
def test_a_projection_that_has_changed(change):
    model, x = feed_forward("swiglu"), rows()
    dx.fuse(model)
    first, seen = model.net[0], []
    with torch.no_grad():
        before = first(x)
        if change == "hook":
            first.proj.register_forward_hook(lambda m, args, y: seen.append(y) or 0 * y)
        elif change == "hook within":
            first.activation.register_forward_hook(lambda m, args, y: seen.append(y) or 0 * y)
        elif change == "activation":
            first.activation = nn.Threshold(1e9, 0.0)
        elif change == "layer":
            first.proj = nn.Linear(48, 2 * 192)
            nn.init.zeros_(first.proj.weight), nn.init.zeros_(first.proj.bias)
        else:
            first.proj.forward = lambda x: x.new_zeros(*x.shape[:-1], 2 * 192)
        assert before.abs().max() > 0
        assert first(x).abs().max() == 0
        assert not seen or seen[0].shape[-1] in (192, 384)


def test_a_gated_weight_that_has_changed_is_noticed():
    model, x = geglu(), rows()
    dx.fuse(model)
    for _ in range(3):
        with torch.no_grad():
            values, gates = F.linear(x, model.proj.weight, model.proj.bias).chunk(2, dim=-1)
            torch.testing.assert_close(model(x), values * F.gelu(gates), rtol=1e-4, atol=1e-5)
            model.proj.weight.data[5:30] *= -1.5


def test_a_transformer_block_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    block = attention.BasicTransformerBlock(32, 4, 8, cross_attention_dim=24).eval()
    x, text = torch.randn(2, 16, 32), torch.randn(2, 7, 24)
    twin, report = fused_copy(block)
    assert len(report.linears) == 10
    with torch.no_grad():
        expected = block(x, encoder_hidden_states=text)
        actual = twin(x, encoder_hidden_states=text)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        count = ops_of(lambda: twin(x, encoder_hidden_states=text))
    assert count["linear"] == 10 * TIMED
    assert count["gelu"] == (0 if TIMED else 1)


# --- what only looks like one ---------------------------------------------------------------------


class Ours(nn.Module):
    """A projection of somebody's."""

    def __init__(self):
        super().__init__()
        self.proj, self.calls = nn.Linear(48, 40), 0

    def forward(self, x):
        return type(self).compute(self, x)


def counted(self, x):
    self.calls += 1
    return F.silu(self.proj(x))


def gated_in_bounds(self, x):
    values, gates = self.proj(x).chunk(2, -1)
    return values * F.silu(gates.clamp(max=50.0))


def chunked_second(self, x):
    values, gates = self.proj(x).chunk(2, 1)
    return values * F.silu(gates)


def by_mode(self, x):
    y = self.proj(x)
    return F.silu(y) if torch.is_grad_enabled() else F.gelu(y)


def turned(self, x):
    y = F.silu(self.proj(x))
    return y if x.dim() == 2 else y.transpose(-1, -2)


OTHERS = {
    "counts its calls": counted,
    "bounds its gates": gated_in_bounds,
    "asks for gradients": by_mode,
    "turns its result": turned,
    "takes out what is no number": lambda self, x: F.silu(self.proj(x)).nan_to_num(),
    "chunks the second dimension": chunked_second,
}


@pytest.mark.parametrize("name", OTHERS)
def test_projections_that_compute_something_else(name):
    kind = type("Kind", (Ours,), {"compute": OTHERS[name]})
    module = kind()
    dx.fuse(module)
    assert not isinstance(module, FusedProjection)
