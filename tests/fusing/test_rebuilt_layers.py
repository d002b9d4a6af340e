"""Fused models in the hands of libraries that look at a layer's type, and build others of it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils import parametrizations

import diffusion_ext as dx
from diffusion_ext.fusing.stand_in import StandIn

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    return model.eval().to(memory_format=torch.channels_last)


def images(channels, seed=1):
    x = torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last)


def run(model):
    t, text = torch.tensor([10, 400, 3, 7]), torch.linspace(-1, 1, 4 * 5 * 8).reshape(4, 5, 8)
    return model(images(4), t, text).sample


# --- adapters -----------------------------------------------------------------------------------

TARGETS = ["to_q", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]


def adapted(fused, **options):
    """A UNet with a LoRA whose weights are not zero, fused "before" or "after", or "never"."""
    peft, model = pytest.importorskip("peft"), unet()
    if fused == "before":
        dx.fuse(model)
    torch.manual_seed(1)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)
    )
    if fused == "after":
        dx.fuse(model)
    return model


@pytest.mark.parametrize("fused", ["before", "after"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_merged_and_unmerged(fused, options):
    plain, model = adapted("never", **options), adapted(fused, **options)
    with torch.no_grad():
        expected, base = run(plain), run(unet())
        assert (expected - base).abs().max() > 1e-2  # the adapter does something
        close(run(model), expected)
        for change in (model.fuse_lora, model.unfuse_lora, lambda: dx.unfuse(model)):
            change()
            close(run(model), expected)
        model.disable_adapters()
        close(run(model), base)


@pytest.mark.parametrize("fused", ["before", "after"])
def test_adapters_trained_and_saved(fused, tmp_path):
    peft = pytest.importorskip("peft")

    def trained(model):
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(model).square().mean().backward()
            optimizer.step()
        return peft.get_peft_model_state_dict(model.eval())

    plain, model = adapted("never"), adapted(fused)
    expected, actual = trained(plain), trained(model)
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        close(actual[name], weight)

    model.save_lora_adapter(tmp_path)
    loaded = unet()
    dx.fuse(loaded)
    loaded.load_lora_adapter(str(tmp_path), prefix=None, use_safetensors=True)
    with torch.no_grad():
        close(run(loaded), run(plain))


def test_adapters_layers_are_torchs():
    model = adapted("before")
    added = [m for n, m in model.named_modules() if "lora_" in n and isinstance(m, nn.Conv2d)]
    assert added
    assert {type(m) for m in added} == {nn.Conv2d}
    assert not any(isinstance(m, StandIn) for m in added)


def test_a_lora_on_a_context_unet():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = dx.nn.ContextUnet(3, 16, 5, 16).eval().to(memory_format=torch.channels_last)
    inputs = images(3), torch.rand(4), torch.randn(4, 5)
    expected = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=4, target_modules=["conv1.0", "conv2.0", "out.0"], init_lora_weights=False
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        unmerged = model(*inputs)
        close(model.merge_and_unload()(*inputs), unmerged)
        assert (unmerged - expected(*inputs)).abs().max() > 1e-3


# --- quantisation -------------------------------------------------------------------------------


class Quantisable(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.layers = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.last = nn.Linear(32, 8)

    def forward(self, x):
        return self.dequant(self.last(self.layers(self.quant(x)).mean((2, 3))))


def dynamic(model):
    return quantization.quantize_dynamic(model, {nn.Linear})


def static(model):
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(model)
    prepared(images(16))
    return quantization.convert(prepared)


def trained_for(model):
    model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(model)
    prepared(images(16)).sum().backward()
    return quantization.convert(prepared.eval())


def of_a_graph(model):
    config = quantization.get_default_qconfig_mapping("fbgemm")
    prepared = quantize_fx.prepare_fx(model, config, (images(16),))
    prepared(images(16))
    return quantize_fx.convert_fx(prepared)


@pytest.mark.parametrize("quantise", [dynamic, static, trained_for, of_a_graph])
def test_torch_ao_quantises_what_is_fused(quantise):
    torch.manual_seed(0)
    plain = Quantisable().eval().to(memory_format=torch.channels_last)
    model = copy.deepcopy(plain)
    dx.fuse(model)
    expected, actual = quantise(plain), quantise(model)
    with torch.no_grad():
        # A rounding apart, which a quantum of the activations may make of another one.
        assert (actual(images(16, 2)) - expected(images(16, 2))).abs().max() < 0.1
    names = [type(m).__name__ for m in actual.modules()]
    assert names == [type(m).__name__ for m in expected.modules()]  # as many of them quantised


# --- types, copies and pickles ------------------------------------------------------------------


class CastingNorm(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def every_kind():
    """A model whose fused modules are of every class that there is."""
    model = nn.ModuleDict(
        {
            "unet": unet(),
            "sequential": nn.Sequential(CastingNorm(4, 16), nn.GELU("tanh"), nn.Conv2d(16, 4, 1)),
            "moving": nn.Conv3d(16, 16, 3, padding=1),
        }
    ).eval()
    dx.fuse(model)
    return model


def rebuilt(module):
    """Another layer, of the same type and sizes, as libraries make it."""
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        sizes = module.in_channels, 4, module.kernel_size
        return type(module)(*sizes, padding=module.padding, bias=False)
    if isinstance(module, nn.Linear):
        return type(module)(module.in_features, 4, False)
    if isinstance(module, diffusers.models.activations.GEGLU):
        return type(module)(8, 8)
    if isinstance(module, diffusers.models.attention_processor.Attention):
        return type(module)(8, heads=2, dim_head=4)
    if isinstance(module, nn.GroupNorm):
        return type(module)(module.num_groups, module.num_channels, module.eps, False)
    if isinstance(module, nn.Sequential):
        return type(module)(*module)
    if isinstance(module, diffusers.models.upsampling.Upsample2D):
        return type(module)(module.channels, use_conv=True)
    return type(module)(in_channels=8, out_channels=8, temb_channels=4, groups=4)


def test_a_stand_in_is_the_class_it_stands_for():
    plain = copy.deepcopy(every_kind())
    dx.unfuse(plain)
    kinds = set()
    for module, original in zip(every_kind().modules(), plain.modules(), strict=True):
        if not isinstance(module, StandIn):
            continue
        cls, wanted = type(module), type(original)
        kinds.add(cls.fused.__name__)
        assert isinstance(module, wanted)
        assert cls == wanted
        assert wanted == cls
        assert {wanted: 1}[cls] == 1
        assert (cls.__name__, cls.__module__) == (wanted.__name__, wanted.__module__)
        if "Absorbed" not in cls.fused.__name__:
            assert type(rebuilt(module)) is wanted
        else:
            assert type(cls()) is wanted
    assert kinds == {
        "AbsorbedActivation", "FusedAttention", "FusedConv2d", "FusedConv3d", "FusedGroupNorm",
        "FusedLinear", "FusedProjection", "FusedResnetBlock2D", "FusedSequential",
        "FusedUpsample2D",
    }  # fmt: skip


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, saved_and_loaded])
def test_copies_stay_fused_and_can_be_unfused(copied):
    model = every_kind()
    fused = [type(m) for m in model.modules()]
    other = copied(model)
    assert [type(m) for m in other.modules()] == fused
    with torch.no_grad():
        close(run(other["unet"]), run(model["unet"]))
        close(other["sequential"](images(16)), model["sequential"](images(16)))
    dx.unfuse(other)
    assert not any(isinstance(m, StandIn) for m in other.modules())


def test_replicas_use_their_own_weights():
    """As torch.nn.DataParallel makes them, one for each device."""
    layer = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)).eval()
    dx.fuse(layer)
    replica = layer[0]._replicate_for_data_parallel()
    replica.weight, replica.bias = layer[0].weight * 2, layer[0].bias * 2
    with torch.no_grad():
        close(replica(images(16)), 2 * layer[0](images(16)))


def test_parametrised_layers():
    results = []
    for fused in (False, True):
        model = unet()
        if fused:
            dx.fuse(model)
        torch.manual_seed(3)
        parametrizations.weight_norm(model.conv_in)
        parametrizations.spectral_norm(model.down_blocks[0].resnets[0].conv1)
        with torch.no_grad():
            results.append(run(model))
    close(*results)


@pytest.mark.parametrize("order", ["fuse, hook", "hook, fuse"])
def test_hooks_that_replace_a_forward(order):
    hooks = pytest.importorskip("accelerate").hooks
    plain, model = unet(), unet()
    for step in order.split(", "):
        if step == "fuse":
            dx.fuse(model)
        else:
            for module in model.modules():
                hooks.add_hook_to_module(module, hooks.ModelHook())
    with torch.no_grad():
        expected = run(plain)
        close(run(model), expected)
        dx.unfuse(model)
        close(run(model), expected)
        for module in model.modules():
            hooks.remove_hook_from_module(module)
        close(run(model), expected)
        dx.unfuse(model)
        assert not any(isinstance(m, StandIn) for m in model.modules())
        close(run(model), expected)
