"""Fused models under what torch does to models: autocast, checkpoints, compile, export, copies."""

import copy
import io
import pickle

import pytest
import torch
from fused_models import assert_same_results, fused_copy, identity_of, ops_of, results
from test_fuse import CASES, AdaptiveBlock, cases, pytestmark, sequential, vary  # noqa: F401
from torch import nn
from torch.utils.checkpoint import checkpoint

import diffusion_ext as dx

TRACED = ["silu", "swish", "guided", "shared", "3d"]


@pytest.mark.parametrize("name", ["silu", "guided", "shared", "norm"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_are_kept(name, layout):
    model, inputs = cases()[name]
    model.to(memory_format=layout)
    inputs[0] = inputs[0].to(memory_format=layout)
    dx.fuse(model)
    assert model(*inputs).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", TRACED)
def test_autocast_gives_the_originals_dtypes_and_no_more_error(name):
    model, inputs = cases()[name]
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        original = model(*inputs)
        dx.fuse(model)
        fused = model(*inputs)
    assert fused.dtype == original.dtype
    errors = [(y - exact).abs().max() for y in (fused, original)]
    assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_under_cudas_autocast_norms_return_float32(monkeypatch):
    """On CUDA torch's autocast runs group_norm in float32, which a GroupNorm32 rounds again."""
    monkeypatch.setattr("diffusion_ext.fusing.modules.AUTOCAST_TO_FLOAT32", ("cpu",))
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    block = AdaptiveBlock().in_layers
    dx.fuse(layers), dx.fuse(block)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0](x).dtype == layers(x).dtype == torch.float32
        assert block[0](x).dtype == block[:2](x).dtype == torch.bfloat16
    assert layers(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, (x,) = sequential(), [torch.randn(2, 3, 5, 4)]
    exact = model(x)
    original = model.to(dtype)(x.to(dtype))
    fused, _ = fused_copy(model)
    y = fused(x.to(dtype))
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= 1.5 * (original - exact).abs().max() + 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, inputs = cases()["guided"]
    expected = results(model, inputs)
    dx.fuse(model)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return checkpoint(self.model, *args, use_reentrant=reentrant)

    actual = {k.replace("model.", ""): v for k, v in results(Checkpointed(), inputs).items()}
    assert_same_results(actual, expected, 1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("name", TRACED)
def test_compiles_whole_with_gradients(name):
    model, inputs = cases()[name]
    expected = results(model, inputs)
    dx.fuse(model)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_same_results(results(model, inputs), expected, 1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["silu", "guided"])
def test_inductors_code_around_the_fused_op(name):
    """The default backend, forward and backward, and forward alone."""
    model, inputs = cases()[name]
    expected = results(model, inputs)
    dx.fuse(model)
    model.compile(fullgraph=True)
    assert_same_results(results(model, inputs), expected, 1e-5)
    with torch.no_grad():
        y = model(*inputs)
    torch.testing.assert_close(y, expected["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", TRACED)
def test_exports_with_the_fused_op(name, strict):
    model, inputs = cases()[name]
    expected = model(*inputs)
    dx.fuse(model)
    program = torch.export.export(model, tuple(inputs), strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    targets = {str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"}
    assert "diffusion_ext.group_norm_act.default" in targets
    assert not [t for t in targets if t.startswith("aten.group_norm")]
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRACED)
def test_copies_and_files(name):
    model, inputs = cases()[name]
    expected = model(*inputs)
    original_repr = repr(model)
    dx.fuse(model)
    served = ops_of(lambda: model(*inputs))["group_norm_act"]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(*inputs), expected, rtol=1e-4, atol=1e-5)
        assert ops_of(lambda copied=copied: copied(*inputs))["group_norm_act"] == served
        dx.unfuse(copied)
        assert repr(copied) == original_repr
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh, _ = cases()[name]
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(torch.load(file), strict=True)
    torch.testing.assert_close(fresh(*inputs), expected)


def test_function_transforms_and_forward_derivatives_are_torchs():
    model, (x,) = sequential(), [torch.randn(3, 2, 3, 5, 4)]
    v = torch.randn(x[0].shape)

    def all_of_them():
        return (
            torch.func.vmap(model)(x),
            torch.func.grad(lambda a: model(a).square().sum())(x[0]),
            torch.func.jvp(model, (x[0],), (v,))[1],
        )

    expected = all_of_them()
    dx.fuse(model)
    for actual, wanted in zip(all_of_them(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(torch|diffusion_ext)")
@pytest.mark.parametrize("name", CASES)
def test_traced_while_gradients_are_recorded(name):
    model, inputs = cases()[name]
    if inputs[0].dim() == 4:
        model.to(memory_format=torch.channels_last)
    expected = model(*inputs)
    dx.fuse(model)
    traced = torch.jit.trace(model, tuple(inputs))  # raises if a second trace differs
    torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_moves_between_dtypes_stay_fused():
    model = sequential()
    dx.fuse(model)
    before = identity_of(model)[-1]
    x = torch.randn(2, 3, 5, 4)
    y = model(x)
    assert torch.equal(model.double().float()(x), y)
    assert identity_of(model)[-1] == before
    assert ops_of(lambda: model(x))["group_norm_act"] == 2


def test_training_steps_agree():
    model = vary(AdaptiveBlock()).train()
    fused, _ = fused_copy(model)
    x, emb = torch.randn(2, 8, 6, 5), torch.randn(2, 6)
    for m in (model, fused):
        optimizer = torch.optim.SGD(m.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            m(x, emb).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
