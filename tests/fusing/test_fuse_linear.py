"""The linear layers of a fused model, and the first halves of its feed-forwards."""

import copy

import pytest
import torch
from fused_models import assert_same_results, fused_copy, ops_of, results
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import diffusion_ext as dx
from diffusion_ext.fusing.feed_forward import FusedProjection
from diffusion_ext.fusing.modules import FusedLinear
from diffusion_ext.nn import kept_weights
from diffusion_ext.nn.kept_linear import weight_bytes
from diffusion_ext.nn.kept_weights import kept_of
from diffusion_ext.ops.conv2d import TIMED

needs_kernel = pytest.mark.skipif(not TIMED, reason="no kernel of ours")


def layer(bias=True):
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias)


def fused(module):
    dx.fuse(module)
    return module


def rows(*shape):
    return torch.randn(*(shape or (2, 9)), 48)


def laid_out(module):
    kept = kept_of(module)
    return None if kept is None else kept.packed.filters


def assert_right(module, x):
    with torch.no_grad():
        bias = None if module.bias is None else module.bias.double()
        expected = F.linear(x.double(), module.weight.double(), bias)
        actual = module(x)
    assert actual.dtype == x.dtype
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


# --- what is fused ------------------------------------------------------------------------------


def test_results_and_gradients_are_those_of_the_original():
    model = nn.Sequential(nn.Linear(48, 70), nn.SiLU(), nn.Linear(70, 40, bias=False))
    twin, report = fused_copy(model)
    assert report.linears == ["0", "2"]
    size = report.linear_bytes
    assert size == weight_bytes(model[0]) + weight_bytes(model[2]) == 4 * (48 * 96 + 70 * 64)
    assert "2 linear layers ours (0.0347 MiB of weights), 0 layers left" in str(report)
    assert "2 linear layers of ours" in report.details()
    x = rows()
    assert_same_results(results(twin, [x]), results(model, [x]), 1e-5)
    assert ops_of(lambda: twin(x))["linear"] == 2 * TIMED
    assert dx.fuse(twin).linears == ["0", "2"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 5)], ids=str)
def test_any_rows(bias, shape):
    module = fused(layer(bias))
    x = torch.randn(*shape, 48)
    assert_right(module, x)
    assert_right(module, x.requires_grad_())


def test_rows_of_any_strides():
    module = fused(layer())
    assert_right(module, torch.randn(9, 2, 48).transpose(0, 1))
    assert_right(module, torch.randn(2, 48, 9).transpose(1, 2))  # torch's
    assert_right(module, torch.randn(2, 9, 96)[..., 48:])
    assert_right(module, torch.randn(1, 1, 48).expand(3, 5, 48))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Written(nn.Linear):
    """One that computes the same, in words of its own."""

    scaling = 1.0

    def forward(self, x):
        return self.scaling * (x @ self.weight.t() + self.bias)


def test_what_is_left_and_why():
    hooked, replaced = layer(), layer()
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x
    model = nn.Sequential(
        Doubled(48, 40), hooked, replaced, nn.LazyLinear(40),
        nn.utils.parametrizations.weight_norm(layer()), Written(48, 40),
    )  # fmt: skip
    report = dx.fuse(model)
    assert report.linears == ["5"]
    assert report.left[:5] == [
        ("0", "Doubled: computes something else than a Linear"),
        ("1", "has hooks"),
        ("2", "its forward is replaced on the instance"),
        ("3", "LazyLinear: has no weight yet"),
        ("4", "is parametrized"),
    ]


def test_a_subclass_that_changes_what_it_computes():
    module, x = fused(Written(48, 40)), rows()
    assert_right(module, x)
    module.scaling = 3.0
    with torch.no_grad():
        torch.testing.assert_close(module(x), 3 * F.linear(x, module.weight, module.bias))


def test_few_channels_are_left(measured_thresholds):
    report = dx.fuse(nn.Sequential(nn.Linear(255, 400), nn.Linear(400, 255)))
    assert report.left == [("0", "torch's is faster for so few channels")]
    assert report.linears == ["1"]


@needs_kernel
def test_little_work_is_torchs(measured_thresholds):
    module = fused(nn.Linear(320, 320))
    with torch.no_grad():
        module(torch.randn(3, 320))
        assert laid_out(module) is None
        module(torch.randn(4, 320))
    assert laid_out(module) is not None


def test_unfusing_gives_everything_back():
    model = nn.Sequential(layer(), geglu())
    before = [type(m) for m in model.modules()], [dict(vars(m)) for m in model.modules()]
    dx.fuse(model)
    with torch.no_grad():
        model[0](rows()), model[1](rows())
    assert (laid_out(model[0]) is not None) == TIMED
    dx.unfuse(model)
    assert laid_out(model[0]) is None
    assert [type(m) for m in model.modules()] == before[0]
    assert all(type(m) is cls for m, cls in zip(model.modules(), before[0], strict=True))
    assert [dict(vars(m)) for m in model.modules()] == before[1]


# --- weights that change ------------------------------------------------------------------------


def merged(module):
    module.weight.data += 0.1 * torch.randn(40, 4).mm(torch.randn(4, 48))


def optimized(module):
    module(rows()).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


CHANGES = {
    "in place": lambda m: torch.no_grad()(m.weight.mul_)(2),
    "merged": merged,
    "data": lambda m: setattr(m.weight, "data", m.weight.data + 1),
    "load_state_dict": lambda m: m.load_state_dict(nn.Linear(48, 40).state_dict()),
    "assigned": lambda m: m.load_state_dict(nn.Linear(48, 40).state_dict(), assign=True),
    "another parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn(40, 48))),
    "of other strides": lambda m: setattr(m.weight, "data", torch.randn(48, 40).t()),
    "by numpy": lambda m: m.weight.detach().numpy().__imul__(2),
    "bias": lambda m: m.bias.data.add_(1),
    "optimized": optimized,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_has_changed_is_noticed(change):
    module, x = fused(layer()), rows()
    assert_right(module, x)
    for _ in range(3):
        CHANGES[change](module)
        assert_right(module, x)


@needs_kernel
def test_kept_between_calls_and_given_back():
    module, x = fused(layer()), rows()
    assert_right(module, x)
    filters = laid_out(module)
    assert filters is not None
    assert_right(module, rows(7))
    assert laid_out(module) is filters
    assert laid_out(copy.deepcopy(module)) is None
    module(x).sum().backward()  # it trains
    assert laid_out(module) is None
    assert_right(module, x)
    assert laid_out(module) is not None
    module.double()
    assert_right(module, x.double())
    assert laid_out(module) is None


def test_little_memory(monkeypatch):
    monkeypatch.setattr(kept_weights, "memory_available", lambda: 0)
    module = fused(layer())
    assert_right(module, rows())
    assert laid_out(module) is None


@pytest.mark.parametrize("made", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("called", [torch.inference_mode, torch.no_grad])
def test_inference_mode(made, called):
    with made():
        module, x = fused(layer()), rows()
    with called():
        for change in (lambda: None, lambda: module.weight.mul_(2)):
            with torch.inference_mode():
                change()
            assert_right(module, x)
            assert (laid_out(module) is not None) == TIMED
    if TIMED:
        assert not laid_out(module).is_inference()


# --- what torch serves --------------------------------------------------------------------------


@needs_kernel
def test_where_torch_serves():
    module, x = fused(layer()), rows()
    with torch.no_grad():
        with torch.autocast("cpu"):
            assert module(x).dtype == torch.bfloat16
        with dx.use_backend("reference"):
            assert_right(module, x)
        assert laid_out(module) is None
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.randn(3, 47))
        with pytest.raises(RuntimeError, match="dtype"):
            module(x.double())
    torch.testing.assert_close(torch.func.vmap(module)(x), module(x))
    assert module(x).requires_grad
    assert laid_out(module) is None


def test_hooks_see_what_they_saw():
    module, seen = fused(layer()), []
    module.register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.no_grad():
        assert module(rows()) is seen[0]


def test_traced():
    module, x = fused(nn.Sequential(layer(), nn.SiLU())), rows()
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,))
        assert "diffusion_ext" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@torch.no_grad()
def test_compiled_and_exported():
    model, x = nn.Sequential(layer(), geglu(40)), rows()
    expected = model(x)
    dx.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    sizes = ({0: torch.export.Dim("batch", max=64)},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    assert program(rows(7, 9)).shape == (7, 9, 24)


# --- adapters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_a_lora(early):
    """fused before the adapter comes or after; then merged, and taken away."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 8)).eval()
    x, states = rows(), []
    for with_fuse in (False, True):
        torch.manual_seed(1)
        model = copy.deepcopy(plain)
        if with_fuse and early:
            dx.fuse(model)
        config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        if with_fuse and not early:
            dx.fuse(model)
        with torch.no_grad():
            state = [model(x)]
            model.merge_adapter()
            state.append(model(x))
            model.unmerge_adapter()
            state.append(model(x))
            model = model.merge_and_unload()
            state.append(model(x))
        states.append(state)
    for actual, expected in zip(*states, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[1][0], plain(x))


# --- feed-forwards ------------------------------------------------------------------------------


class GEGLU(nn.Module):
    """As CompVis and many others write it."""

    def __init__(self, channels, out_features):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_features)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Backwards(GEGLU):
    """The gate first, which is not ours."""

    def forward(self, x):
        gate, x = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


def geglu(channels=48):
    torch.manual_seed(0)
    return GEGLU(channels, 24)


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
    model, x = fused(geglu()), rows()
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


# --- what a review found ------------------------------------------------------------------------


@needs_kernel
def test_a_square_weight_that_is_transposed_past_its_version(small_work_counts):
    module, x = fused(nn.Linear(48, 48)), rows()
    assert_right(module, x)
    module.weight.data = module.weight.data.t()
    assert_right(module, x)


@pytest.mark.parametrize("how", ["pruned", "parametrized", "a tensor"])
@pytest.mark.parametrize(
    "kind", [nn.Linear, lambda c, k: nn.Conv2d(c, k, 1)], ids=["Linear", "Conv2d"]
)
def test_a_bias_that_is_no_parameter(kind, how, small_work_counts):
    module, x = kind(48, 40).to(memory_format=torch.channels_last), rows()
    if isinstance(module, nn.Conv2d):
        x = torch.randn(2, 48, 9, 9).to(memory_format=torch.channels_last)
    twin, _ = fused_copy(module)
    for one in (module, twin):
        torch.manual_seed(1)
        if how == "pruned":
            prune.random_unstructured(one, "bias", 0.3)
        elif how == "parametrized":
            nn.utils.parametrize.register_parametrization(one, "bias", nn.Softplus())
        else:
            bias = one.bias.detach() + 1
            del one.bias
            one.bias = bias
    with torch.no_grad():
        torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1,), (1, 40), (2, 9, 40)], ids=str)
def test_a_bias_that_torch_broadcasts(shape, small_work_counts):
    module = layer()
    module.bias = nn.Parameter(torch.randn(shape))
    twin, _ = fused_copy(module)
    with torch.no_grad():
        x = rows()
        torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
def test_tensors_without_strides(small_work_counts):
    module = layer()
    twin, _ = fused_copy(module)
    x = torch.randn(9, 48)
    with torch.no_grad():
        for odd in (x.to_sparse_csr(), torch.nested.nested_tensor([x, x[:3]])):
            y, expected = twin(odd), module(odd)
            assert y.layout == expected.layout


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
    "chunks the second dimension": lambda self, x: torch.mul(*self.proj(x).chunk(2, 1)).sigmoid(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_projections_that_compute_something_else(name):
    kind = type("Kind", (Ours,), {"compute": OTHERS[name]})
    module = kind()
    dx.fuse(module)
    assert not isinstance(module, FusedProjection)


@needs_kernel
def test_a_weight_that_is_lent_for_a_call_is_not_laid_out(small_work_counts, tmp_path):
    """accelerate's offloading: what is laid out would take the memory that it saves."""
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 40)), rows()
    twin, _ = fused_copy(model)
    accelerate.disk_offload(twin, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(laid_out(module) is None for module in twin)
    assert twin[0].weight.is_meta
