"""fuse over diffusers' ResnetBlock2D: every kind of block, its errors, hooks and other versions."""

import pytest
import torch
from fused_models import assert_same_results, fused_copy, ops_of, results, vary_gently
from test_fuse import pytestmark  # noqa: F401

import diffusion_ext as dx

pytest.importorskip("diffusers")

from diffusers.models.resnet import ResnetBlock2D

from diffusion_ext.fusing import diffusers_blocks
from diffusion_ext.ops.conv2d import TIMED


@pytest.mark.parametrize("time_embedding_norm", ["default", "scale_shift"])
@pytest.mark.parametrize(
    "options",
    [
        {"up": True, "kernel": "fir"},
        {"down": True, "kernel": "sde_vp"},
        {"up": True, "skip_time_act": True},
        {"out_channels": 4, "output_scale_factor": 1.5, "non_linearity": "gelu"},
        {"dropout": 0.5, "use_in_shortcut": True},
    ],
    ids=str,
)
def test_blocks_of_every_kind(options, time_embedding_norm):
    sizes = {"in_channels": 8, "temb_channels": 5, "groups": 2}
    block = ResnetBlock2D(**sizes, time_embedding_norm=time_embedding_norm, **options)
    block = vary_gently(block).train()
    x = torch.randn(2, 8, 4, 4)
    for rows in (2, 1):  # an embedding each, or one for all
        inputs = [x, torch.randn(rows, 5)]
        torch.manual_seed(1)
        expected = results(block, inputs)
        fused, _ = fused_copy(block)
        torch.manual_seed(1)
        assert_same_results(results(fused, inputs), expected, 1e-5)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("factor", [1.0, 1.5])
@pytest.mark.parametrize("out_channels", [8, 24])
def test_the_residual_in_the_convolutions_pass(out_channels, factor, grad_mode):
    """Of a frozen block, on channels_last: no sum and no division is left."""
    sizes = {"in_channels": 8, "out_channels": out_channels, "temb_channels": 5, "groups": 2}
    block = vary_gently(ResnetBlock2D(**sizes, output_scale_factor=factor)).eval()
    block = block.requires_grad_(False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    temb = torch.randn(2, 5)
    fused, _ = fused_copy(block)
    with grad_mode():
        torch.testing.assert_close(fused(x, temb), block(x, temb), rtol=1e-4, atol=1e-5)
    ops = ops_of(lambda: fused(x, temb))
    if TIMED:
        assert ops["conv2d"] == (2 if out_channels == 8 else 3)
        assert not ops["add"] + ops["div"]
    watched = []
    fused.conv2.register_forward_hook(lambda *_: watched.append(1))
    torch.testing.assert_close(fused(x, temb), block(x, temb), rtol=1e-4, atol=1e-5)
    assert watched


@pytest.mark.compiles
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inductors_code_around_the_fused_op(layout):
    """Forward and backward: inductor may choose other strides for what it hands to the op."""
    block = ResnetBlock2D(
        in_channels=8, out_channels=4, temb_channels=5, groups=2, time_embedding_norm="scale_shift"
    )
    block = vary_gently(block).to(memory_format=layout)
    inputs = [torch.randn(2, 8, 4, 4).to(memory_format=layout), torch.randn(2, 5)]
    expected = results(block, inputs)
    dx.fuse(block)
    block.compile(fullgraph=True)
    assert_same_results(results(block, inputs), expected, 1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("time_embedding_norm", ["default", "scale_shift"])
def test_exports_with_a_batch_and_a_size_left_open(time_embedding_norm, strict):
    sizes = {"in_channels": 8, "temb_channels": 5, "groups": 2}
    block = vary_gently(ResnetBlock2D(**sizes, time_embedding_norm=time_embedding_norm))
    x, temb = torch.randn(7, 8, 10, 4), torch.randn(7, 5)
    expected = block(x, temb)
    dx.fuse(block)
    batch, height = torch.export.Dim("batch", max=512), torch.export.Dim("height", min=2, max=512)
    shapes = {0: batch, 2: height}, {0: batch}
    example = torch.randn(2, 8, 6, 4), torch.randn(2, 5)
    program = torch.export.export(block, example, dynamic_shapes=shapes, strict=strict)
    torch.testing.assert_close(program.module()(x, temb), expected, rtol=1e-4, atol=1e-5)


def test_a_block_without_embedding_and_its_errors():
    block = vary_gently(ResnetBlock2D(in_channels=8, temb_channels=None, groups=2))
    x = torch.randn(2, 8, 4, 4)
    expected = block(x, None)
    dx.fuse(block)
    torch.testing.assert_close(block(x, None), expected)
    block = ResnetBlock2D(in_channels=8, temb_channels=5, groups=2)
    block.time_emb_proj, block.time_embedding_norm = None, "scale_shift"
    dx.fuse(block)
    with pytest.raises(ValueError, match="`temb` should not be None"):
        block(x, None)


def test_hooks_and_subclasses_in_blocks_are_respected():
    class Louder(ResnetBlock2D):
        def forward(self, x, temb):
            return 2 * super().forward(x, temb)

    x, temb, sizes = torch.randn(2, 8, 4, 4), torch.randn(2, 5), {"temb_channels": 5, "groups": 2}
    louder = Louder(in_channels=8, **sizes)
    expected = louder(x, temb)
    assert [how for _, how in dx.fuse(louder).fused] == ["alone", "alone"]
    torch.testing.assert_close(louder(x, temb), expected)
    for place in ("norm1", "norm2", "nonlinearity"):
        block, seen = ResnetBlock2D(in_channels=8, **sizes), []
        handle = getattr(block, place).register_forward_hook(
            lambda m, args, y, seen=seen: seen.append(y)
        )
        block(x, temb)
        dx.fuse(block)
        block(x, temb)
        first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        torch.testing.assert_close(second, first)
        handle.remove()
        assert ops_of(lambda block=block: block(x, temb))["native_group_norm"] == (
            0 if place == "nonlinearity" else 1
        )


def test_an_unknown_version_of_the_block_is_fused_alone(monkeypatch):
    def forward(self, input_tensor, temb):
        return self.conv1(self.nonlinearity(self.norm1(input_tensor))) + 1

    diffusers_blocks.forward_is_known.cache_clear()
    monkeypatch.setattr(ResnetBlock2D, "forward", forward)
    report = dx.fuse(ResnetBlock2D(in_channels=8, temb_channels=5, groups=2))
    diffusers_blocks.forward_is_known.cache_clear()
    why = "alone: this version's ResnetBlock2D computes something else"
    assert report.fused == [("norm1", why), ("norm2", why)]
