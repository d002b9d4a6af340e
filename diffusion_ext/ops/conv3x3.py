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
# 64 channels those take as long as the kernel gains on 30 tiles, with 512 on 70.
TILES = 64
VECTORISED = "cpu" not in missing and cpu_capability() != "baseline"


def serves_conv3x3(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel serves x and weight [K, C, 3, 3], and faster than a direct convolution:
    float32 on a CPU with AVX2 or AVX-512, x [B, C, H, W] in channels_last, of a multiple of 16
    channels, and images of which no more than half of their 4x4 tiles lies outside."""
    if not (x.is_cpu and x.dim() == 4 and x.dtype == weight.dtype == torch.float32):
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
    the 144 that 16 outputs take. Its rounding is that of a direct sum (csrc/math/winograd.h), but
    an infinity in x makes NaNs of all outputs of its tile. The gradient of x is such a convolution
    again; the weight's is torch's. With create_graph=True all of it is torch's.

    Returns: [B, K, H, W]. Raises: what F.conv2d raises.
    """
    if serves_conv3x3(x, weight) and len(x) * _tiles(*x.shape[2:]) >= TILES:
        if needs_grad(x, weight, bias):
            return _Conv3x3.apply(x, weight, bias)
        return filtered(x, filters_of(weight), bias, len(weight))
    return reference.conv3x3(x, weight, bias)


def filters_of(weight: Tensor, transposed: bool = False) -> Tensor:
    """weight [K, C, 3, 3] as `filtered` wants it: transformed, [⌈K/32⌉, 36, C, 32].

    `transposed`: for the gradient of x, from that of the convolution.
    """
    return kernels().conv3x3_filters(weight, transposed)


def filtered(x: Tensor, filters: Tensor, bias: Tensor | None, out_channels: int, act="identity"):
    """act(conv3x3(x, weight, bias)) of the weight's `filters_of`, where the kernel serves x.

    Returns: [B, K, H, W], channels_last.
    """
    return kernels().conv3x3(x, filters, bias, out_channels, ACTIVATIONS.index(act))


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return filtered(x, filters_of(weight), bias, len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad)
        # Not with create_graph=True, where the gradient has to have one.
        ours = wanted[0] and not torch.is_grad_enabled()
        if ours := ours and serves_conv3x3(dy, weight.transpose(0, 1)):
            dx = filtered(dy, filters_of(weight, transposed=True), None, x.shape[1])
        others = [wanted[0] and not ours, *wanted[1:]]
        sizes, ones = [len(weight)] if ctx.has_bias else None, [1, 1]
        how = (sizes, ones, ones, ones, False, [0, 0], 1)  # stride, padding, dilation, ... groups
        gradients = torch.ops.aten.convolution_backward(dy, x, weight, *how, others)
        return dx if ours else gradients[0], *gradients[1:]


def _tiles(height: int, width: int) -> int:
    """Of an image of that size."""
    return -(-height // TILE) * -(-width // TILE)


@register_fake("conv3x3_filters")
def _(weight, transposed):
    out, channels = weight.shape[transposed], weight.shape[1 - transposed]
    return weight.new_empty(-(-out // COLUMNS), POINTS, channels, COLUMNS)


@register_fake("conv3x3")
def _(x, filters, bias, out_channels, act):
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[3], out_channels)
    return y.permute(0, 3, 1, 2)
