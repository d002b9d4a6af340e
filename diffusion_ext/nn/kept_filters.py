"""The filters of convolutions, kept between calls, and never used once their weight has changed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops.backend import NATIVE_DTYPES, needs_grad, serves
from ..ops.conv2d import (
    CHANNELS,
    COLUMNS,
    POINTS,
    SHARES_OF_TORCH,
    TIMED,
    gains_on_fast_halves,
    serves_conv2d,
)
from ..ops.conv3x3 import conv3x3
from ..ops.layouts import convolves_to_channels_last, has_strides, suggests_channels_last
from .kept_weights import (
    Kept,
    can_be_laid_out,
    forget,
    forget_if_moved,
    holds_its_numbers,
    is_plain,
    keep,
    kept_of,
)
from .packed_conv2d import PackedConv2d

# What a direct convolution of ours has to be for it to gain on torch's, of channels_last images:
# products for each output, and in all. Measured on a Zen 4 with AVX-512, one thread: of 1x1 filters
# of 64, 128, 320 and 640 channels ours take 1.1, 1.02, 0.93, 0.91 of torch's time, and a call 5 us
# more. By Winograd's algorithm they take 0.3 to 0.7.
LEAST_SUM, LEAST_PRODUCTS = 256, 1_500_000
# Products that make ours gain where torch's are slow of half precision, of sums of any length: of
# 100 thousand ours take 0.6 of torch's time, of a million 0.1.
LEAST_OF_SLOW = 100_000
MOST_SIZES = 64  # of images, for each convolution, of which it is kept how torch's result lies


@dataclass(slots=True)
class KeptFilters(Kept):
    """What is kept of a convolution, whose `packed` is a PackedConv2d.

    Attributes:
        gains: shape and dtype of images, stride and upsampling -> whether ours gain on torch's.
        formats: shape, strides and upsampling of images -> whether torch's result of them is
            channels_last.
    """

    gains: dict[tuple, bool] = field(default_factory=dict)
    formats: dict[tuple, bool] = field(default_factory=dict)


def convolved(conv: nn.Conv2d, x: Tensor, repeat: int = 1, **after) -> Tensor | None:
    """conv(x), of x upsampled `repeat` times and with what is `after` it (see `conv2d`), by a
    convolution of ours; None where that is not to be had.

    It is to be had of NATIVE_DTYPES on a CPU where ours are `TIMED` and torch's result is
    channels_last: because x is that, or the weight, in which case x is copied. Without gradients
    filters stay laid out between calls, and the work has to be worth a call. With gradients, or
    where memory is short, it is `conv3x3` that serves, if conv is that and nothing else is asked
    for, in float32.
    """
    weight = conv._parameters.get("weight")
    if not TIMED or not has_strides(x) or x.dtype not in NATIVE_DTYPES or not x.is_cpu:
        forget_if_moved(conv, weight)
        return None
    if weight is None or torch.compiler.is_compiling():
        return _once(conv, x, repeat, after)
    kept, key = kept_of(conv), (x.shape, x.dtype, conv.stride, repeat)
    # What is fused saves a pass, for which ours gain wherever torch's products are no faster.
    asked = (repeat == 1 and not after) or x.dtype in SHARES_OF_TORCH
    small = kept is not None and asked and kept.gains.get(key) is False
    if x.dtype != weight.dtype or (small and not torch.is_grad_enabled()):
        return None  # of two dtypes torch makes its error
    strides, of_weight = x.stride(), weight.stride()
    if len(strides) != 4 or (strides[1] > strides[3] and of_weight[1] > of_weight[3]):
        return None  # contiguous, as torch's result is then
    bias, residual = conv._parameters.get("bias"), after.get("residual")
    if needs_grad(x, weight, bias, residual):
        forget(conv)  # it trains
        return _once(conv, x, repeat, after)
    if not serves(x) or torch.is_autocast_enabled("cpu") or not is_plain(conv, weight):
        return None
    kept = _filters_of(conv, kept, weight, of_weight)
    if kept is None or not _is_channels_last(kept, x, strides, weight, repeat):
        return None
    if asked and not _gains(kept, key):
        return None
    if residual is not None and not _adds_to_channels_last(residual, x):
        return None
    if not holds_its_numbers(kept, weight):
        forget(conv)  # memory is short
        return _once(conv, x, repeat, after)
    images = x.contiguous(memory_format=torch.channels_last)
    return kept.packed(images, bias, repeat, **after)


def _adds_to_channels_last(residual: Tensor, x: Tensor) -> bool:
    """Whether torch's sum of the residual and a channels_last convolution of x has x's dtype and is
    channels_last: it lies as the residual does."""
    lies_so = not residual.is_contiguous() and suggests_channels_last(residual)
    return lies_so and residual.dtype == x.dtype


def _once(conv: nn.Conv2d, x: Tensor, repeat: int, after: dict) -> Tensor | None:
    """conv(x) by filters that serve this call alone."""
    if repeat > 1 or after or not is_plain_conv3x3(conv) or x.dim() != 4:
        return None
    if x.dtype != torch.float32:
        return None
    if torch.compiler.is_exporting() or not serves(x):  # a program's sizes may be left open
        return None
    weight = conv.weight
    if x.shape[1] != weight.shape[1] or not convolves_to_channels_last(x, weight):
        return None
    images = x.contiguous(memory_format=torch.channels_last)
    return conv3x3(images, weight, conv.bias) if serves_conv2d(images, weight) else None


def _filters_of(conv: nn.Conv2d, kept, weight: Tensor, strides) -> KeptFilters | None:
    """What is kept of conv; None where nothing can be."""
    settings = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode

    def make(of: tuple) -> KeptFilters | None:
        dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
        if not (dense and weight.numel() > 0 and packs(conv) and can_be_laid_out(weight)):
            return None
        return KeptFilters(of, PackedConv2d(weight.detach(), conv.stride, conv.padding))

    return keep(conv, kept, weight, (strides, weight.dtype, settings), make)


def _is_channels_last(kept: KeptFilters, x: Tensor, strides, weight: Tensor, repeat: int) -> bool:
    """Whether torch's result for x, upsampled `repeat` times, is channels_last; found once for each
    shape and strides."""
    key = x.shape, strides, repeat
    if (found := kept.formats.get(key)) is None:
        if len(kept.formats) >= MOST_SIZES:
            kept.formats.clear(), kept.gains.clear()
        fits = x.numel() > 0 and x.shape[1] == weight.shape[1]
        found = kept.formats[key] = fits and convolves_to_channels_last(x, weight)
    return found


def _gains(kept: KeptFilters, key: tuple) -> bool:
    """Whether ours take less time than torch's, of images of a shape and dtype, by a stride."""
    if (found := kept.gains.get(key)) is None:
        packed, ((batch, _, *size), dtype, stride, repeat) = kept.packed, key
        height, width = (repeat * side for side in size)
        winograd, numbers = packed.by_winograd(batch, height, width), math.prod(packed.shape[1:])
        outputs = batch, height // stride[0], width // stride[1]
        if (share := SHARES_OF_TORCH.get(dtype)) is not None:
            found = gains_on_fast_halves(share, *outputs, numbers, packed.out_channels, winograd)
        else:
            products = math.prod(outputs) * numbers * packed.out_channels
            least = LEAST_OF_SLOW if is_slow_of_torch(dtype) else LEAST_PRODUCTS
            found = winograd or products >= least
        kept.gains[key] = found
    return found


def is_slow_of_torch(dtype: torch.dtype) -> bool:
    """Whether torch has no fast products of that dtype, of NATIVE_DTYPES."""
    return dtype != torch.float32 and dtype not in SHARES_OF_TORCH


def packs(conv: nn.Conv2d) -> bool:
    """Whether a direct convolution is what conv computes: zeros around, no dilation, no groups."""
    return (
        (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and not isinstance(conv.padding, str)
    )  # fmt: skip


def is_plain_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether conv is what conv3x3 computes: 3x3 filters, zeros around, an output for a pixel."""
    sizes = (conv.kernel_size, conv.stride, conv.padding)
    return packs(conv) and sizes == ((3, 3), (1, 1), (1, 1))


def may_gain(conv: nn.Conv2d) -> bool:
    """Whether ours gain on torch's for images of some size: by Winograd's algorithm, or where each
    output is a sum of enough products, or torch has no fast ones."""
    by_winograd = is_plain_conv3x3(conv) and conv.in_channels % CHANNELS == 0
    return by_winograd or conv.weight[0].numel() >= LEAST_SUM or is_slow_of_torch(conv.weight.dtype)


def filter_bytes(conv: nn.Conv2d) -> int:
    """Of conv's filters once they are laid out, the larger ones where there is a choice."""
    out_channels, channels, height, width = conv.weight.shape
    by_winograd = is_plain_conv3x3(conv) and channels % CHANNELS == 0
    of_tap = 4 * POINTS if by_winograd else conv.weight.element_size() * height * width
    return of_tap * channels * -(-out_channels // COLUMNS) * COLUMNS
