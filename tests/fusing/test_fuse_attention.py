"""Modules whose attention ours serves: what is found, what is answered, what stays torch's."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from fused_models import assert_same_results, fused_copy, ops_of, results
from torch import nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.fusing.attention import FusedAttention
from diffusion_ext.ops.attention import TIMED

needs_kernel = pytest.mark.skipif(not TIMED, reason="no kernel of ours")


class Attention(nn.Module):
    """One of nobody's library. options: of torch's function."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def heads(tokens=80, dtype=torch.float32, size=16):
    return [torch.randn(2, 3, tokens, size).to(dtype) for _ in range(3)]


def fused(module):
    assert dx.fuse(module).attentions
    return module


def calls(module, *arguments):
    with torch.no_grad():
        return ops_of(lambda: module(*arguments))["attention"]


def test_what_is_found():
    report = dx.fuse(nn.Sequential(Attention(), nn.Identity(), nn.MultiheadAttention(8, 2)))
    assert report.attentions == ["0"]
    assert "1 attentions ours" in str(report)
    assert "1 attentions of ours" in report.details()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_ours_serve(dtype):
    module, given = fused(Attention()), heads(dtype=dtype)
    masks = [None, torch.rand(80, 80) > 0.2, torch.randn(2, 1, 1, 80).to(dtype)]
    for mask in masks:
        assert calls(module, *given, mask) == 1
        with torch.no_grad():
            y, torchs = module(*given, mask), F.scaled_dot_product_attention(*given, mask)
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        expected = F.scaled_dot_product_attention(*(t.double() for t in given), wide)
        error, allowed = ((t - expected).abs().max() for t in (y, torchs))
        assert error <= 1.5 * allowed
        assert y.dtype == dtype
        assert y.stride() == torchs.stride()
    assert calls(fused(Attention(is_causal=True, scale=0.1)), *given) == 1


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (Attention(), heads(dtype=torch.float64)),
        (Attention(), heads(tokens=15)),
        (Attention(enable_gqa=True), [t[:, :h] for t, h in zip(heads(), (2, 1, 1), strict=True)]),
        (Attention(), [t[0] for t in heads()]),
        (Attention(), [t[:, :1] if i == 0 else t for i, t in enumerate(heads())]),
    ],
    ids=["float64", "few queries", "grouped", "three dimensions", "broadcast"],
)
def test_what_stays_torchs(module, given):
    fused_module = fused(copy.deepcopy(module))
    assert calls(fused_module, *given) == 0
    assert torch.equal(fused_module(*given), module(*given))


def test_what_torch_refuses_it_refuses_still():
    module, (q, k, v) = fused(Attention()), heads()
    for wrong in ((q, k.half(), v), (q, k[..., :8], v), (q, k, v, torch.zeros(80, 80).long())):
        with torch.no_grad(), pytest.raises(RuntimeError):
            module(*wrong)


def test_gradients_dropout_and_autocast_are_torchs():
    module, (q, k, v) = fused(Attention()), heads()
    (wanted,) = torch.autograd.grad(module(q.requires_grad_(), k, v).sum(), q)
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), q)
    assert torch.equal(wanted, expected)
    torch.manual_seed(0)
    dropped = fused(Attention(dropout_p=0.5))(q, k, v)
    torch.manual_seed(0)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    with torch.autocast("cpu"), torch.no_grad():
        assert module(q, k, v).dtype == torch.bfloat16


def test_unfuse_gives_back_what_was_there():
    module = Attention()
    fused(module)
    assert isinstance(module, FusedAttention)
    assert type(module) == Attention  # noqa: E721 as whoever compares types sees it
    dx.unfuse(module)
    assert type(module) is Attention
    assert calls(module, *heads()) == 0


def test_a_forward_that_is_replaced_is_left():
    module = Attention()
    module.forward = lambda q, k, v: q
    assert not dx.fuse(module).attentions


def test_other_threads_and_calls_outside_are_torchs():
    """What a fused module does reaches no call outside it, and none after an error in it."""
    module, given = fused(Attention()), heads()
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(given[0], given[1].half(), given[2])
    with torch.no_grad():
        found = ops_of(lambda: F.scaled_dot_product_attention(*given))
    assert found["attention"] == 0


class SelfAttention(nn.Module):
    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(x, x, x, mask)


def test_exporters_and_tracers_see_the_signature():
    module, (x, *_) = fused(SelfAttention()), heads()
    assert torch.jit.trace(module, example_kwarg_inputs={"x": x})(x).shape == x.shape
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {2: tokens}})
    assert program.module()(x[:, :, :5]).shape == (2, 3, 5, 16)
    assert torch.fx.symbolic_trace(module)(x).shape == x.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_tensors_without_strides():
    module, (x, *_) = fused(Attention()), heads()
    nested = torch.nested.nested_tensor([x[0], x[1, :, :7]])
    with torch.no_grad():
        y, expected = module(nested, nested, nested), F.scaled_dot_product_attention(*[nested] * 3)
    for one, other in zip(y.unbind(), expected.unbind(), strict=True):
        assert torch.equal(one, other)


@needs_kernel
def test_processors_that_are_set_later():
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).eval()
    x, text = torch.randn(2, 80, 32), torch.randn(2, 9, 24)
    assert dx.fuse(block).attentions == ["attn1", "attn2"]
    given = (x, None, text)
    assert calls(block, *given) == 2
    block.attn1.set_processor(AttnProcessor())  # products and a softmax
    assert calls(block, *given) == 1
    block.attn1.set_processor(AttnProcessor2_0())
    assert calls(block, *given) == 2


def unet():
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
    )  # fmt: skip


def flux():
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


NETWORKS = {
    "UNet2DConditionModel": (
        unet,
        lambda: (torch.randn(2, 4, 16, 16), 5, torch.randn(2, 9, 24)),
        {},
    ),
    "AutoencoderKL": (
        lambda: AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        lambda: (torch.randn(1, 3, 16, 16),),
        {},
    ),
    "Flux": (
        flux,
        lambda: (torch.randn(1, 64, 16), torch.randn(1, 20, 24), torch.randn(1, 8)),
        {
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.randn(64, 3),
            "txt_ids": torch.zeros(20, 3),
            "guidance": None,
        },
    ),
    "SD3": (
        lambda: SD3Transformer2DModel(
            sample_size=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            in_channels=4,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        lambda: (
            torch.randn(1, 4, 16, 16),
            torch.randn(1, 20, 24),
            torch.randn(1, 8),
            torch.tensor([5]),
        ),
        {},
    ),
    "Wan": (
        lambda: WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
        ),
        lambda: (torch.randn(1, 4, 2, 16, 16), torch.tensor([5]), torch.randn(1, 9, 24)),
        {},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_diffusers(name):
    build, draw, options = NETWORKS[name]
    torch.manual_seed(0)
    model, given = build().eval(), draw()
    twin, report = fused_copy(model)
    assert report.attentions
    with torch.no_grad():
        expected = model(*given, **options, return_dict=False)[0]
        assert (ops_of(lambda: twin(*given, **options))["attention"] > 0) == TIMED
        y = twin(*given, **options, return_dict=False)[0]
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.compiles
def test_compiled():
    block = BasicTransformerBlock(32, 2, 16).eval()
    x = torch.randn(2, 80, 32)
    with torch.no_grad():
        expected = block(x)
        dx.fuse(block)
        y = torch.compile(block, fullgraph=True)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_training_is_as_before():
    block = BasicTransformerBlock(32, 2, 16)
    twin, _ = fused_copy(block)
    x = torch.randn(2, 80, 32)
    assert_same_results(results(twin, [x]), results(block, [x]), 1e-5)
