"""conv3d: convolutions of images that move, on the CPU, of weights that were laid out before."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import kernel, kernels, register_fake
from .group_norm_act import ACTIVATIONS

THREE = tuple[int, int, int]


def conv3d(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: THREE = (1, 1, 1),
    padding: THREE = (1, 1, 1),
    residual: Tensor | None = None,
    act: str = "identity",
    scale: float = 1.0,
    contiguous: bool = False,
) -> Tensor:
    """scale·(act(F.conv3d(x, weight, bias, stride, padding)) + residual), without gradients.

    Args:
        x: [B, C, T, H, W], of one of NATIVE_DTYPES on the CPU. It is read where it lies in
            channels_last_3d, and copied where it does not.
        filters: what `winograd_filters` (stride 1 within a frame) or `direct_filters` made of the
            weight [K, C, T', R, S]. bias: [K] of x's dtype, or None.
        out_channels: K.
        stride, padding: of time, height and width. Frames outside are zeros, as pixels are.
        residual: of the outputs' shape and dtype, or None. act: one of group_norm_act's.
        contiguous: whether the result is contiguous; channels_last_3d otherwise.

    Half precision is computed in float32 and rounded once, at the end.

    Returns: [B, K, T'', H', W']. Raises: RuntimeError for what does not fit.
    """
    op = kernels().conv3d if torch.compiler.is_compiling() else kernel("conv3d")
    return op(
        x, filters, bias, residual, out_channels, *stride, *padding, ACTIVATIONS.index(act), scale,
        contiguous,
    )  # fmt: skip


@register_fake("conv3d")
def _(
    x, filters, bias, residual, out_channels, stride_time, stride_high, stride_wide,
    padding_time, padding_high, padding_wide, act, scale, contiguous,
):  # fmt: skip
    by_winograd = filters.dim() == 5
    taps = (filters.shape[2], 3, 3) if by_winograd else filters.shape[1:4]
    strides = stride_time, stride_high, stride_wide
    paddings = padding_time, padding_high, padding_wide
    sizes = [
        (size + 2 * padding - of_filter) // stride + 1
        for size, of_filter, stride, padding in zip(
            x.shape[2:], taps, strides, paddings, strict=True
        )
    ]
    if contiguous:
        return x.new_empty(x.shape[0], out_channels, *sizes)
    return x.new_empty(x.shape[0], *sizes, out_channels).permute(0, 4, 1, 2, 3)
