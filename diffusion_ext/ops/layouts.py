"""The memory format of a tensor, as its strides tell it."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# The dimensions of a tensor in that format, by their strides.
_ORDER = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def has_strides(x) -> bool:
    """Whether x is a plain tensor, neither sparse nor nested nor another library's."""
    return type(x) is Tensor and x.layout is torch.strided and not x.is_nested


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
    """Whether torch's C++ takes x for channels_last: suggest_memory_format().

    It compares strides, those of sizes of 1 too, and asks not whether x is dense: from channels
    over columns and rows to samples, none may be shorter than what lies within it. This is false of
    most contiguous tensors of one channel, for which is_contiguous(memory_format=channels_last) is
    true, and true of a slice of a channels_last one, for which that is false. Only 4-D and 5-D
    tensors have the format.
    """
    strides, least = x.stride(), 0
    if len(strides) not in _ORDER or not 0 < strides[1] <= strides[-1]:
        return False
    sizes = x.shape
    for dim in _ORDER[len(strides)]:
        if strides[dim] < least:
            return False
        if dim == 0 and least == strides[1]:  # of one pixel and channel: contiguous as well
            return False
        least = strides[dim] * sizes[dim]
    return x.numel() > 0


def layout_of_norm(x: Tensor, activated: bool) -> torch.memory_format:
    """Of F.group_norm(x) on a CPU, and of an activation after it: channels_last (3-D) where x
    suggests that. An activation, as any elementwise op, makes contiguous what is that as well: of
    one channel or pixel. The strides are those of torch.empty(shape, memory_format=...)."""
    if torch._C._are_functorch_transforms_active() or not suggests_channels_last(x):
        return torch.contiguous_format
    if activated and (x.shape[1] == 1 or x.shape[2:].numel() == 1):
        return torch.contiguous_format
    return _CHANNELS_LAST[x.dim()]


def in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """y in a memory format, with the strides that a new tensor has in it, of sizes of 1 too."""
    y = y.contiguous(memory_format=layout)
    if torch._C._are_functorch_transforms_active():
        return y
    new = torch.empty(y.shape, device="meta", memory_format=layout)
    return y if y.stride() == new.stride() else y.clone(memory_format=layout)


def empty_sum(x: Tensor) -> Tensor:
    """A tensor for a fake kernel, with the strides of a·x + b·y, where y lies as x does. They
    differ from x's only for sizes of 0 and 1, and where x is not dense."""
    return (2 * x).abs()


def _still_suggests_it(x: Tensor) -> bool:
    """Whether x suggests channels_last once it has been laid out so. What is dense in that format
    already keeps its strides; a copy suggests it unless a sample is one number."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return suggests_channels_last(x)
    return x.numel() > len(x)
