"""The filters of convolutions of images that move, kept between calls (see kept_filters.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops.backend import NATIVE_DTYPES, needs_grad, serves
from ..ops.conv2d import COLUMNS, POINTS, SHARES_OF_TORCH, TIMED, gains_on_fast_halves
from ..ops.layouts import has_strides
from .kept_filters import (
    LEAST_OF_SLOW,
    LEAST_PRODUCTS,
    LEAST_SUM,
    MOST_SIZES,
    is_slow_of_torch,
)
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
from .packed_conv3d import PackedConv3d, is_of_winograd


@dataclass(slots=True)
class KeptFilters3d(Kept):
    """What is kept of a Conv3d, whose `packed` is a PackedConv3d.

    Attributes:
        formats: shape and strides of images, threads -> the memory format of torch's result where
            ours gain on it; None where they do not.
    """

    formats: dict[tuple, torch.memory_format | None] = field(default_factory=dict)


def convolved_3d(conv: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """conv._conv_forward(x, weight, bias) by a convolution of ours; None where that is not to be
    had.

    It is to be had without gradients, of NATIVE_DTYPES on a CPU where ours are `TIMED`, in torch's
    memory format. Images that are not channels_last_3d are copied there and back, where that is
    worth it.
    """
    parameters = conv._parameters
    if weight is not parameters.get("weight") or bias is not parameters.get("bias"):
        return None  # of another's making
    if not TIMED or not has_strides(x) or x.dtype not in NATIVE_DTYPES or not x.is_cpu:
        forget_if_moved(conv, weight)
        return None
    if torch.compiler.is_compiling() or x.dim() != 5 or x.dtype != weight.dtype:
        return None  # of two dtypes torch makes its error
    if needs_grad(x, weight, bias):
        forget(conv)  # it trains
        return None
    if not serves(x) or torch.is_autocast_enabled("cpu") or not is_plain(conv, weight):
        return None
    kept = _filters_of(conv, weight)
    if kept is None or (layout := _format_of(conv, kept, x)) is None:
        return None
    if not holds_its_numbers(kept, weight):
        forget(conv)  # memory is short
        return None
    return kept.packed(x, bias, contiguous=layout == torch.contiguous_format)


def _filters_of(conv: nn.Conv3d, weight: Tensor) -> KeptFilters3d | None:
    """What is kept of conv; None where nothing can be."""
    settings = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode

    def make(of: tuple) -> KeptFilters3d | None:
        layouts = torch.contiguous_format, torch.channels_last_3d
        dense = any(weight.is_contiguous(memory_format=layout) for layout in layouts)
        if not (dense and weight.numel() > 0 and packs_3d(conv) and can_be_laid_out(weight)):
            return None
        return KeptFilters3d(of, PackedConv3d(weight.detach(), conv.stride, conv.padding))

    return keep(conv, kept_of(conv), weight, (weight.stride(), weight.dtype, settings), make)


def _format_of(conv: nn.Conv3d, kept: KeptFilters3d, x: Tensor) -> torch.memory_format | None:
    """The memory format of torch's result for x; None where ours do not gain on torch."""
    # Small images have another convolution of torch's, whose results are contiguous; which are
    # small depends on the threads too.
    key = x.shape, x.stride(), torch.get_num_threads()
    if key not in kept.formats:
        if len(kept.formats) >= MOST_SIZES:
            kept.formats.clear()
        kept.formats[key] = _found_format(conv, kept.packed, x)
    return kept.formats[key]


def _found_format(conv: nn.Conv3d, packed: PackedConv3d, x: Tensor) -> torch.memory_format | None:
    images, weight = packed.images(x), conv.weight
    # Torch refuses most of these, in words of its own.
    if x.numel() == 0 or x.shape[1] != weight.shape[1] or min(images) <= 0:
        return None
    slow, share = is_slow_of_torch(x.dtype), SHARES_OF_TORCH.get(x.dtype)
    if math.prod(images) * weight.numel() < (LEAST_OF_SLOW if slow else LEAST_PRODUCTS):
        return None
    layout = layout_of_conv3d(conv, x)
    if slow:
        return layout
    if share is not None:
        winograd, numbers = packed.by_winograd(*images), weight[0].numel()
        gains = gains_on_fast_halves(share, *images, numbers, packed.out_channels, winograd)
        return layout if gains else None
    # Measured on a Zen 4, one thread and two. Filters of 3x3: ours take 0.2 to 0.5 of torch's time,
    # and no more where images are so small that they are served directly. Of one pixel: 0.5 to 0.8
    # of it in place, 0.9 to 2 with copies. Larger ones and strides: 1 to 1.3.
    in_place = layout == torch.channels_last_3d and x.is_contiguous(memory_format=layout)
    return layout if _is_3x3(conv) or (in_place and _is_one_pixel(conv)) else None


def layout_of_conv3d(conv: nn.Conv3d, x: Tensor) -> torch.memory_format:
    """Of F.conv3d(x, conv.weight, ...): its strides are those of torch.empty(..., memory_format).
    Torch itself is asked, as its own fake tensors ask it."""
    how = conv.stride, conv.padding, conv.dilation, False, (0, 0, 0), conv.groups
    backend = torch._C._select_conv_backend(x, conv.weight, conv.bias, *how)
    return torch._C._conv_determine_backend_memory_format(x, conv.weight, backend)


def packs_3d(conv: nn.Conv3d) -> bool:
    """Whether conv has zeros around, no dilation and no groups."""
    settings = conv.dilation, conv.groups, conv.padding_mode
    return settings == ((1, 1, 1), 1, "zeros") and not isinstance(conv.padding, str)


def may_gain_3d(conv: nn.Conv3d) -> bool:
    """Whether ours gain on torch's for images of some size: by Winograd's algorithm, or where each
    output is a sum of enough products along time and channels alone, or torch has no fast ones."""
    if is_slow_of_torch(conv.weight.dtype):
        return True
    return _is_3x3(conv) or (_is_one_pixel(conv) and conv.weight[0].numel() >= LEAST_SUM)


def filter_bytes_3d(conv: nn.Conv3d) -> int:
    """Of conv's filters once they are laid out, the larger ones where there is a choice."""
    out_channels, channels, frames, height, width = conv.weight.shape
    of_tap = 4 * POINTS if _is_3x3(conv) else conv.weight.element_size() * height * width
    return of_tap * frames * channels * -(-out_channels // COLUMNS) * COLUMNS


def _is_3x3(conv: nn.Conv3d) -> bool:
    """Whether Winograd's algorithm may serve."""
    return is_of_winograd(conv.in_channels, conv.kernel_size[1:], conv.stride)


def _is_one_pixel(conv: nn.Conv3d) -> bool:
    return conv.kernel_size[1:] == conv.stride[1:] == (1, 1)
