"""fuse over diffusers' models with random weights: their blocks, UNets and autoencoders."""

import json
import pickle
from functools import partial

import pytest
import torch
from fused_models import (
    assert_same_results,
    first_tensor,
    fused_copy,
    identity_of,
    ops_of,
    results,
    vary_gently,
)
from test_fuse import pytestmark  # noqa: F401
from torch import nn

import diffusion_ext as dx

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKL,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    VQModel,
)


def unet(**options):
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    } | options
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    return UNet2DModel(sample_size=8, layers_per_block=1, **sizes, **blocks)


def resampling_unet():
    return unet(
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
    )


def text_unet(cls=UNet2DConditionModel, dims=2):
    return cls(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=6,
        down_block_types=(f"CrossAttnDownBlock{dims}D", f"DownBlock{dims}D"),
        up_block_types=(f"UpBlock{dims}D", f"CrossAttnUpBlock{dims}D"),
    )


def autoencoder(cls=AutoencoderKL, width=8, **options):
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return cls(block_out_channels=(width, 2 * width), norm_num_groups=4, **blocks, **options)


def spatial_autoencoder():
    return autoencoder(VQModel, width=32, norm_type="spatial", num_vq_embeddings=8)


# name -> (model, shape of its input, norms fused with an activation, norms fused alone)
CASES = {
    "unet": (unet, (2, 3, 8, 8), 17, 4),
    "unet scale_shift": (partial(unet, resnet_time_scale_shift="scale_shift"), (2, 3, 8, 8), 17, 3),
    "unet resampling": (resampling_unet, (2, 3, 8, 8), 19, 0),
    "unet mish": (partial(unet, act_fn="mish"), (2, 3, 8, 8), 17, 4),
    "text unet": (text_unet, (2, 4, 8, 8), 17, 4),
    "video unet": (partial(text_unet, UNet3DConditionModel, 3), (2, 4, 2, 8, 8), 49, 9),
    "autoencoder": (autoencoder, (2, 3, 8, 8), 22, 2),
    "autoencoder spatial": (spatial_autoencoder, (2, 3, 8, 8), 9, 15),
}


def build(name):
    """A model of CASES, and inputs for it."""
    make, shape, *_ = CASES[name]
    inputs = [torch.randn(shape)]
    if "unet" in name:
        inputs.append(torch.tensor([3, 400]))
    if name in ("text unet", "video unet"):
        inputs.append(torch.randn(2, 5, 6))
    return vary_gently(make()), inputs


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_original(name):
    model, inputs = build(name)
    if isinstance(model, VQModel):  # rounding may choose another code: the decoder alone
        model, inputs = model.decoder, [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    expected = results(model, inputs)
    fused, _ = fused_copy(model)
    assert_same_results(results(fused, inputs), expected, 2e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_fused_and_that_it_serves(name):
    model, inputs = build(name)
    paired, alone = CASES[name][2:]
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    before = ops_of(lambda: model(*inputs))
    report = dx.fuse(model)
    kinds = [how for _, how in report.fused]
    assert sum(how.startswith("with ") for how in kinds) == paired
    assert sum(how.startswith("alone") for how in kinds) == alone
    assert paired + alone == norms
    after = ops_of(lambda: model(*inputs))
    assert after["group_norm_act"] == before["native_group_norm"] == norms
    assert after["native_group_norm"] == 0
    saved = sum(before[name] - after[name] for name in ("silu", "mish"))
    assert saved == paired


@pytest.mark.parametrize("name", CASES)
def test_unfuse_restores_exactly_and_the_state_dict_never_changes(name):
    model, inputs = build(name)
    before = identity_of(model), repr(model), [(type(m), sorted(vars(m))) for m in model.modules()]
    y = first_tensor(model(*inputs))
    report = dx.fuse(model)
    assert identity_of(model) == before[0]
    assert dx.fuse(model) == report
    dx.unfuse(model)
    after = identity_of(model), repr(model), [(type(m), sorted(vars(m))) for m in model.modules()]
    assert after == before
    assert torch.equal(first_tensor(model(*inputs)), y)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(diffusers|torch)")
def test_traced_while_gradients_are_recorded():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = vary_gently(unet())

        def forward(self, x, t):
            return self.unet(x, t).sample

    model, inputs = Plain(), (torch.randn(2, 3, 8, 8), torch.tensor(3))
    expected = model(*inputs)
    dx.fuse(model)
    traced = torch.jit.trace(model, inputs)  # raises if a second trace differs
    torch.testing.assert_close(traced(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_reports_name_the_embedding_and_what_is_left():
    report = dict(dx.fuse(unet(resnet_time_scale_shift="scale_shift")).fused)
    embedded = "with SiLU, ResnetBlock2D, time embedding as scale and shift"
    assert report["mid_block.resnets.0.norm2"] == embedded
    assert report["mid_block.resnets.0.norm1"] == "with SiLU, ResnetBlock2D"
    assert report["conv_norm_out"] == "with SiLU, output"
    report = dict(dx.fuse(unet(act_fn="mish")).fused)
    assert report["mid_block.resnets.0.norm1"] == "with Mish, ResnetBlock2D"
    fused = dict(dx.fuse(spatial_autoencoder()).fused)
    assert fused["decoder.conv_norm_out.norm_layer"] == "alone"  # scaled and shifted by maps


def test_the_output_norm_keeps_its_activation_whatever_happens():
    """Hooked later, unfused by itself, or shared: norm and activation are both still applied."""
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    model, seen = vary_gently(unet()), []
    expected = model(x, t).sample
    dx.fuse(model)
    handle = model.conv_norm_out.register_forward_hook(lambda m, args, y: seen.append(y.min()))
    torch.testing.assert_close(model(x, t).sample, expected)
    assert seen[0] < -0.3  # SiLU's least value is -0.28
    handle.remove()
    dx.unfuse(model.conv_norm_out)
    torch.testing.assert_close(model(x, t).sample, expected)
    dx.unfuse(model)
    model.conv_act = model.mid_block.resnets[0].nonlinearity
    shared = dict(dx.fuse(model).fused)["conv_norm_out"]
    assert shared == "alone: it or the activation after it serves elsewhere too"
    torch.testing.assert_close(model(x, t).sample, expected)


def test_saved_as_the_class_it_was(tmp_path):
    model = vary_gently(unet())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 400])
    expected = model(x, t).sample
    dx.fuse(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
    assert torch.equal(UNet2DModel.from_pretrained(tmp_path)(x, t).sample, expected)
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(x, t).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["unet scale_shift", "text unet"])
def test_training_with_gradient_checkpointing(name):
    model, inputs = build(name)
    model.train()
    expected = results(model, inputs)
    dx.fuse(model)
    model.enable_gradient_checkpointing()
    assert_same_results(results(model, inputs), expected, 2e-5)


@pytest.mark.parametrize("name", ["unet", "text unet", "autoencoder"])
def test_autocast_gives_the_originals_dtype_and_no_more_error(name):
    model, inputs = build(name)
    exact = first_tensor(model(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        original = first_tensor(model(*inputs))
        dx.fuse(model)
        fused = first_tensor(model(*inputs))
    assert fused.dtype == original.dtype
    errors = [(y - exact).square().mean().sqrt() for y in (fused, original)]
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("name", ["unet scale_shift", "autoencoder"])
def test_channels_last_is_kept(name):
    model, inputs = build(name)
    model = model.to(memory_format=torch.channels_last)
    inputs[0] = inputs[0].to(memory_format=torch.channels_last)
    expected = first_tensor(model(*inputs))
    dx.fuse(model)
    y = first_tensor(model(*inputs))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("name", ["unet", "unet scale_shift", "text unet", "autoencoder"])
def test_compiles_whole_and_exports(name):
    model, inputs = build(name)
    expected = first_tensor(model(*inputs))
    dx.fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = first_tensor(compiled(*inputs))
        program = torch.export.export(model, tuple(inputs))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "diffusion_ext.group_norm_act.default" in targets
    exported = first_tensor(program.module()(*inputs))
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
