"""The memory format of a tensor, as its strides tell it."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last (3-D: of [N, C, D, H, W]) where x is that alone, else contiguous_format.

    Of a tensor inside torch.func.vmap, which cannot be asked, it is contiguous_format.
    """
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is None or x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    return layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format


def convolves_to_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether F.conv2d(x, weight) on a CPU, without groups, is channels_last.

    Torch makes it channels_last where x or the weight suggests that, contiguous otherwise. Either
    way its strides are those of torch.empty(shape, memory_format=...), whatever the bias, filter,
    stride, padding, dilation and dtype, with gradients and without; x's gradient has the same
    format. So a channels_last weight, or an x whose strides look so by accident, is enough: of 1
    channel with its pixels a step of 1 apart, say. Not so without oneDNN (NNPACK's outputs are
    contiguous), and not of an empty batch, whose strides torch takes from a product.

    Args: x: [B, C, H, W], B > 0. weight: [K, C, R, S]. Neither need be dense.
    """
    of_x, of_weight = x.stride(), weight.stride()
    if of_x[1] > of_x[3] and of_weight[1] > of_weight[3]:  # most that are contiguous
        return False
    if suggests_channels_last(x):
        if x.numel() > len(x):  # most that are channels_last
            return True
    elif not suggests_channels_last(weight):
        return False
    # Torch lays both out as channels_last, and then asks a second time.
    return _still_suggests_it(x) or _still_suggests_it(weight)


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch's C++ takes x [B, C, H, W] for channels_last: suggest_memory_format().

    It compares strides, those of sizes of 1 too, and asks not whether x is dense: from channels
    over columns and rows to samples, none may be shorter than what lies within it. This is false of
    most contiguous tensors of one channel, for which is_contiguous(memory_format=channels_last) is
    true, and true of a slice of a channels_last one, for which that is false.
    """
    per_sample, per_channel, per_row, per_column = x.stride()
    if not 0 < per_channel <= per_column:
        return False
    _, channels, height, width = x.shape
    return (
        per_channel * channels <= per_column
        and per_column * width <= per_row
        and per_row * height <= per_sample
        and per_row * height != per_channel  # of one pixel and channel: contiguous as well
        and x.numel() > 0
    )


def _still_suggests_it(x: Tensor) -> bool:
    """Whether x suggests channels_last once it has been laid out so. What is dense in that format
    already keeps its strides; a copy suggests it unless a sample is one number."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return suggests_channels_last(x)
    return x.numel() > len(x)
