"""The linear layers of a fused model."""

import copy

import pytest
import torch
from fused_models import assert_same_results, fused_copy, geglu, ops_of, results, rows
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import diffusion_ext as dx
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


# --- odd weights, biases and inputs --------------------------------------------------------------


@needs_kernel
def test_a_square_weight_that_is_transposed_past_its_version():
    module, x = fused(nn.Linear(48, 48)), rows()
    assert_right(module, x)
    module.weight.data = module.weight.data.t()
    assert_right(module, x)


@pytest.mark.parametrize("how", ["pruned", "parametrized", "a tensor"])
@pytest.mark.parametrize(
    "kind", [nn.Linear, lambda c, k: nn.Conv2d(c, k, 1)], ids=["Linear", "Conv2d"]
)
def test_a_bias_that_is_no_parameter(kind, how):
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
def test_a_bias_that_torch_broadcasts(shape):
    module = layer()
    module.bias = nn.Parameter(torch.randn(shape))
    twin, _ = fused_copy(module)
    with torch.no_grad():
        x = rows()
        torch.testing.assert_close(twin(x), module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested")
def test_tensors_without_strides():
    module = layer()
    twin, _ = fused_copy(module)
    x = torch.randn(9, 48)
    with torch.no_grad():
        sparse, nested = x.to_sparse_csr(), torch.nested.nested_tensor([x, x[:3]])
        assert torch.equal(twin(sparse), module(sparse))
        for y, expected in zip(twin(nested).unbind(), module(nested).unbind(), strict=True):
            assert torch.equal(y, expected)


@needs_kernel
def test_a_weight_that_is_lent_for_a_call_is_not_laid_out(tmp_path):
    """accelerate's offloading: what is laid out would take the memory that it saves."""
    accelerate = pytest.importorskip("accelerate")
    model, x = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 40)), rows()
    twin, _ = fused_copy(model)
    accelerate.disk_offload(twin, tmp_path, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(laid_out(module) is None for module in twin)
    assert twin[0].weight.is_meta
