"""Models on their way to other runtimes: traced and exported, they consist of torch's own ops."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import diffusion_ext as dx
from diffusion_ext.sampling.runtimes import openvino_core

diffusers = pytest.importorskip("diffusers")

# The exporters' own: of deprecations, and of sizes that a trace fixes.
pytestmark = pytest.mark.filterwarnings("ignore")


class Unet(nn.Module):
    """A diffusers UNet of resnet blocks and attention, as a function of tensors."""

    def __init__(self):
        super().__init__()
        self.unet = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            layers_per_block=1,
        )

    def forward(self, x, t):
        return self.unet(x, t).sample


def fused():
    model = Unet().eval()
    images = torch.randn(2, 3, 16, 16), torch.tensor([10, 400])
    expected = model(*images)
    dx.fuse(model)
    return model, images, expected


def context_unet():
    model = dx.nn.ContextUnet(3, 16, 5, 16).eval()
    images = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 5)
    with dx.use_backend("reference"):
        return model, images, model(*images)


def optimized():
    model, images, expected = context_unet()
    return dx.optimize_for_sampling(model), images, expected


MAKERS = [fused, context_unet, optimized]


@pytest.fixture(params=MAKERS, ids=lambda f: f.__name__)
def case(request):
    torch.manual_seed(0)
    with torch.no_grad():
        yield request.param()


def close(actual, expected, tolerance=1e-5):
    actual, expected = np.asarray(actual), expected.numpy()
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(1, np.abs(expected).max())


def run_onnx(path, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, named)[0]


def run_openvino(source, inputs, **options):
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(source, **options)
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x.numpy() for x in inputs])[0]


def test_traces_pass_torchs_own_check(case):
    model, inputs, expected = case
    traced = torch.jit.trace(model, inputs)  # which runs it again, and compares
    close(traced(*inputs), expected)
    assert "diffusion_ext::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_runs_in_both_runtimes(case, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    model, inputs, expected = case
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, inputs, path, dynamo=dynamo)
    close(run_onnx(path, inputs), expected)
    close(run_openvino(path, inputs), expected)


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx_of_an_open_batch(dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model, inputs, _ = context_unet()
    path, names = str(tmp_path / "model.onnx"), ["x", "t", "c"]
    if dynamo:
        open_batch = {"dynamic_shapes": {name: {0: torch.export.Dim("batch")} for name in names}}
    else:
        open_batch = {"dynamic_axes": {name: {0: "batch"} for name in names}}
    torch.onnx.export(model, inputs, path, dynamo=dynamo, input_names=names, **open_batch)
    others = torch.randn(5, 3, 16, 16), torch.rand(5), torch.randn(5, 5)
    with torch.no_grad():
        close(run_onnx(path, others), model(*others))


def test_openvino_converts_the_module_itself(case):
    model, inputs, expected = case
    close(run_openvino(model, inputs, example_input=inputs), expected)


def test_torch_export_keeps_our_ops_and_the_reference_backend_leaves_them_out(case):
    model, inputs, expected = case

    def ours(program):
        return {str(n.target) for n in program.graph.nodes if "diffusion_ext" in str(n.target)}

    program = torch.export.export(model, inputs)
    close(program.module()(*inputs), expected)
    assert ours(program) or isinstance(model, dx.nn.OptimizedContextUnet)
    with dx.use_backend("reference"):
        portable = torch.export.export(model, inputs)
    assert not ours(portable)
    close(portable.module()(*inputs), expected)
    close(run_openvino(portable, inputs), expected)


def test_the_steps_and_noising_are_traced_as_torchs_ops():
    schedule = dx.NoiseSchedule.linear(100)
    x, m, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([5, 9])

    def both(x, m, t):
        return dx.ddpm_step(x, m, t, schedule, noise=m), dx.perturb(x, t, schedule, noise=m)[0]

    traced = torch.jit.trace(both, (x, m, t))
    assert "diffusion_ext::" not in str(traced.inlined_graph)
    for actual, expected in zip(traced(m, x, t + 1), both(m, x, t + 1), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_fx_and_script_take_a_fused_model_as_they_take_it_unfused():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1)
    plain = nn.Sequential(conv, nn.GroupNorm(4, 16), nn.SiLU()).eval()
    x = torch.randn(8, 16, 16, 16).to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    dx.fuse(model)
    with torch.no_grad(), warnings.catch_warnings():
        expected = plain(x)
        close(torch.fx.symbolic_trace(model)(x), expected)
        close(torch.jit.script(model)(x), expected)
        close(model(x), expected)
    assert type(model[0]) is nn.Conv2d  # scripting gave the modules their own classes back
