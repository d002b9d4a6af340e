"""conv3x3: 3x3 convolutions with padding 1 on the CPU, by Winograd's F(4x4, 3x3), with gradients.

conv2d.py has those of weights that were laid out before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backend import kernels, needs_grad, register_fake
from .conv2d import CHANNELS, TILE, serves_conv2d, tiles_of

# Tiles from which the filters' transforms are worth their time where they serve one call only: with
# 64 channels those take as long as the kernel gains on 4 to 8 tiles, with 512 on 12 to 25.
TILES = 32


def serves_conv3x3(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel serves x and weight [K, C, 3, 3], and faster than a direct convolution:
    as `serves_conv2d`, float32, x of a multiple of 16 channels, and images of which no more than
    half of their 4x4 tiles lies outside."""
    if x.dtype != torch.float32 or not serves_conv2d(x, weight):
        return False
    _, channels, height, width = x.shape
    out_channels, wanted = weight.shape[:2]
    return (
        channels == wanted
        and channels % CHANNELS == 0
        and out_channels >= CHANNELS
        and 2 * height * width >= TILE * TILE * tiles_of(1, height, width)
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
    if serves_conv3x3(x, weight) and tiles_of(len(x), *x.shape[2:]) >= TILES:
        if needs_grad(x, weight, bias):
            return _Conv3x3.apply(x, weight, bias)
        return kernels().conv3x3_once(x, weight, bias, False)
    return reference.conv3x3(x, weight, bias)


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


@register_fake("conv3x3_once")
def _(x, weight, bias, transposed):
    batch, _, height, width = x.shape
    return x.new_empty(batch, height, width, weight.shape[transposed]).permute(0, 3, 1, 2)


@register_fake("conv3x3_weight_gradient")
def _(x, dy, weight):
    return torch.empty_like(weight)
