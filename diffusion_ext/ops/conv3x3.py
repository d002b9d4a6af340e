"""conv3x3: 3x3 convolutions with padding 1 on the CPU, by Winograd's F(4x4, 3x3)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import kernels, missing, needs_grad, register_fake, serves
from .group_norm_act import ACTIVATIONS

if "cpu" not in missing:
    from .._C import cpu_capability

CHANNELS = 16  # the kernel takes inputs of a multiple of so many channels
TILE = 4  # side of the outputs that are computed together
POINTS, COLUMNS = 36, 32  # numbers of a transformed tile; output channels that lie together
# Tiles from which the filters' transforms are worth their time where they serve one call only: with
# 64 channels those take as long as the kernel gains on 15 tiles, with 512 on 25 to 90.
TILES = 64
VECTORISED = "cpu" not in missing and cpu_capability() != "baseline"


def serves_conv3x3(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel serves x and weight [K, C, 3, 3], and faster than a direct convolution:
    float32 on a CPU with AVX2 or AVX-512, x [B, C, H, W] in channels_last, of a multiple of 16
    channels, and images of which no more than half of their 4x4 tiles lies outside. Exported
    programs, whose sizes may be open, have the direct convolution."""
    if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.float32):
        return False
    if x.dim() != 4 or torch.compiler.is_exporting():
        return False
    _, channels, height, width = x.shape
    out_channels, wanted = weight.shape[:2]
    return (
        channels == wanted
        and channels % CHANNELS == 0
        and out_channels >= CHANNELS
        and 2 * height * width >= TILE * TILE * _tiles(height, width)
        and VECTORISED
        and serves(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d(x, weight, bias, padding=1), differentiable.

    Args: x: [B, C, H, W]. weight: [K, C, 3, 3]. bias: [K] or None.

    Where the kernel serves, Winograd's minimal filtering (Lavin & Gray 2016) makes 36 products of
    the 144 that 16 outputs take. Its rounding is near that of a direct sum (csrc/math/winograd.h),
    but an infinity in x makes NaNs of all outputs of its tile. The gradients of x and weight are
    made in the same way, where K is a multiple of 16 too and create_graph is not asked for.

    Returns: [B, K, H, W]. Raises: what F.conv2d raises.
    """
    if serves_conv3x3(x, weight) and len(x) * _tiles(*x.shape[2:]) >= TILES:
        if needs_grad(x, weight, bias):
            return _Conv3x3.apply(x, weight, bias)
        return kernels().conv3x3_once(x, weight, bias, False)
    return reference.conv3x3(x, weight, bias)


def filters_of(weight: Tensor) -> Tensor:
    """weight [K, C, 3, 3] as `filtered` wants it: transformed, [⌈K/32⌉, 36, C, 32]."""
    return kernels().conv3x3_filters(weight)


def filtered(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, act="identity"):
    """act(conv3x3(x, weight, bias)) of the weight's `filters_of`, where the kernel serves x.

    Returns: [B, K, H, W], channels_last.
    """
    return kernels().conv3x3(x, filters, bias, out_channels, ACTIVATIONS.index(act))


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return kernels().conv3x3_once(x, weight, bias, False)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        out_channels = len(weight)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # With create_graph=True, where grad is enabled, the gradient has to have one.
        if torch.is_grad_enabled() or out_channels % CHANNELS:
            sizes, ones = [out_channels] if of_bias else None, [1, 1]
            how = (sizes, ones, ones, ones, False, [0, 0], 1)  # stride, padding, dilation, groups
            return torch.ops.aten.convolution_backward(dy, x, weight, *how, ctx.needs_input_grad)
        return (
            kernels().conv3x3_once(dy, weight, None, True) if of_x else None,
            kernels().conv3x3_weight_gradient(x, dy, weight) if of_weight else None,
            dy.sum((0, 2, 3)) if of_bias else None,
        )


def _tiles(height: int, width: int) -> int:
    """Of an image of that size."""
    return -(-height // TILE) * -(-width // TILE)


@register_fake("conv3x3_filters")
def _(weight):
    out_channels, channels = weight.shape[:2]
    return weight.new_empty(-(-out_channels // COLUMNS), POINTS, channels, COLUMNS)


@register_fake("conv3x3")
def _(x, filters, bias, out_channels, act):
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, out_channels).permute(0, 3, 1, 2)


@register_fake("conv3x3_once")
def _(x, weight, bias, transposed):
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, weight.shape[transposed]).permute(0, 3, 1, 2)


@register_fake("conv3x3_weight_gradient")
def _(x, dy, weight):
    return torch.empty_like(weight)
