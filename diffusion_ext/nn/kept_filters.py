"""The filters of convolutions, kept between calls, and never used once their weight has changed."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..ops.backend import missing, needs_grad, serves
from ..ops.conv2d import CHANNELS, COLUMNS, POINTS, TIMED, serves_conv2d
from ..ops.conv3x3 import conv3x3
from ..ops.layouts import convolves_to_channels_last, suggests_channels_last
from ..ops.memory import memory_available, memory_in_all
from .packed_conv2d import PackedConv2d, version_of

if "cpu" not in missing:
    from .._C import fingerprint

FREE = 4  # filters are laid out while one part in so many of the machine's memory stays free

# What a direct convolution of ours has to be for it to gain on torch's, of channels_last images:
# products for each output, and in all. Measured on a Zen 4 with AVX-512, one thread: of 1x1 filters
# of 64, 128, 320 and 640 channels ours take 1.1, 1.02, 0.93, 0.91 of torch's time, and a call 5 us
# more. By Winograd's algorithm they take 0.3 to 0.7.
LEAST_SUM, LEAST_PRODUCTS = 256, 1_500_000
MOST_SIZES = 64  # of images, for each convolution, of which it is kept how torch's result lies


@dataclass(slots=True)
class Kept:
    """What is kept of a convolution.

    Attributes:
        of: its settings, and what its weight was. numbers: the fingerprint of that weight.
        packed: its filters. gains: shape of images, stride -> whether ours gain on torch's.
        formats: shape, strides and upsampling of images -> whether torch's result of them is
            channels_last.
    """

    of: tuple
    packed: PackedConv2d
    numbers: int | None = None
    gains: dict[tuple, bool] = field(default_factory=dict)
    formats: dict[tuple, bool] = field(default_factory=dict)


# Beside the modules, whose copies, pickles and state dicts know nothing of it.
_kept: weakref.WeakKeyDictionary[nn.Conv2d, Kept] = weakref.WeakKeyDictionary()


def convolved(conv: nn.Conv2d, x: Tensor, repeat: int = 1, **after) -> Tensor | None:
    """conv(x), of x upsampled `repeat` times and with what is `after` it (see `conv2d`), by a
    convolution of ours; None where that is not to be had.

    It is to be had of float32 on a CPU where ours are `TIMED` and torch's result is channels_last:
    because x is that, or the weight, in which case x is copied. Without gradients filters stay laid
    out between calls, and the work has to be worth a call. With gradients, or where memory is
    short, it is `conv3x3` that serves, if conv is that and nothing else is asked for.
    """
    weight = conv._parameters.get("weight")
    if not TIMED or type(x) is not Tensor or x.dtype != torch.float32 or not x.is_cpu:
        if _kept and weight is not None and (weight.dtype != torch.float32 or not weight.is_cpu):
            forget(conv)  # it has moved
        return None
    if weight is None or torch.compiler.is_compiling():
        return _once(conv, x, repeat, after)
    kept, alone = _kept.get(conv), repeat == 1 and not after
    small = kept is not None and alone and kept.gains.get((x.shape, conv.stride)) is False
    if small and not torch.is_grad_enabled():
        return None
    strides, of_weight = x.stride(), weight.stride()
    if len(strides) != 4 or (strides[1] > strides[3] and of_weight[1] > of_weight[3]):
        return None  # contiguous, as torch's result is then
    bias, residual = conv._parameters.get("bias"), after.get("residual")
    if needs_grad(x, weight, bias, residual):
        forget(conv)  # it trains
        return _once(conv, x, repeat, after)
    if not serves(x) or torch.is_autocast_enabled("cpu"):
        return None
    kept = _kept_of(conv, kept, weight, of_weight)
    if kept is None or not _is_channels_last(kept, x, strides, weight, repeat):
        return None
    if alone and not _gains(kept, (x.shape, conv.stride)):
        return None
    if residual is not None and (residual.is_contiguous() or not suggests_channels_last(residual)):
        return None  # torch's sum would lie as the residual does
    if not _holds_its_numbers(kept, weight):
        forget(conv)  # memory is short
        return _once(conv, x, repeat, after)
    images = x.contiguous(memory_format=torch.channels_last)
    return kept.packed(images, bias, repeat, **after)


def forget(module: nn.Module) -> None:
    """Give back the memory of its filters, where it has some."""
    _kept.pop(module, None)


def _once(conv: nn.Conv2d, x: Tensor, repeat: int, after: dict) -> Tensor | None:
    """conv(x) by filters that serve this call alone."""
    if repeat > 1 or after or not is_plain_conv3x3(conv) or x.dim() != 4:
        return None
    if torch.compiler.is_exporting() or not serves(x):  # a program's sizes may be left open
        return None
    weight = conv.weight
    if x.shape[1] != weight.shape[1] or not convolves_to_channels_last(x, weight):
        return None
    images = x.contiguous(memory_format=torch.channels_last)
    return conv3x3(images, weight, conv.bias) if serves_conv2d(images, weight) else None


def _kept_of(conv: nn.Conv2d, kept: Kept | None, weight: Tensor, strides) -> Kept | None:
    """What is kept of conv, whose settings and whose weight's version, address and strides are as
    they were; None where nothing can be.

    An operation in place raises the version. What was written past it, through `.data`, as adapters
    are merged and averages are swapped in, is for `_holds_its_numbers` to find.
    """
    settings = conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    of = version_of(weight), weight.data_ptr(), strides, settings
    if kept is None or kept.of != of:
        if not _can_be_laid_out(conv, weight):
            return None
        kept = Kept(of, PackedConv2d(weight.detach(), conv.stride, conv.padding))
        _kept[conv] = kept
    return kept


def _can_be_laid_out(conv: nn.Conv2d, weight: Tensor) -> bool:
    if type(weight) is not nn.Parameter or weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    bias = conv._parameters.get("bias")
    if bias is not None and (bias.dtype != torch.float32 or not bias.is_cpu):
        return False  # which torch refuses, in words of its own
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return packs(conv) and dense and weight.numel() > 0


def _holds_its_numbers(kept: Kept, weight: Tensor) -> bool:
    """Have kept's filters be those of weight's numbers; False where there is no memory for them."""
    filters = weight.shape[0]
    numbers = fingerprint(weight.data_ptr(), filters, weight.numel() // filters)
    if numbers != kept.numbers:
        if memory_available() < memory_in_all() // FREE + 4 * weight.nbytes:
            return False
        kept.packed.winograd = kept.packed.direct = None
        kept.numbers = numbers
    return True


def _is_channels_last(kept: Kept, x: Tensor, strides, weight: Tensor, repeat: int) -> bool:
    """Whether torch's result for x, upsampled `repeat` times, is channels_last; found once for each
    shape and strides."""
    key = x.shape, strides, repeat
    if (found := kept.formats.get(key)) is None:
        if len(kept.formats) >= MOST_SIZES:
            kept.formats.clear(), kept.gains.clear()
        fits = x.numel() > 0 and x.shape[1] == weight.shape[1]
        found = kept.formats[key] = fits and convolves_to_channels_last(x, weight)
    return found


def _gains(kept: Kept, key: tuple) -> bool:
    """Whether ours take less time than torch's, of images of a shape, by a stride."""
    if (found := kept.gains.get(key)) is None:
        packed, ((batch, channels, height, width), stride) = kept.packed, key
        products = batch * height * width // (stride[0] * stride[1])
        products *= channels * packed.out_channels * packed.shape[2] * packed.shape[3]
        found = packed.by_winograd(batch, height, width) or products >= LEAST_PRODUCTS
        kept.gains[key] = found
    return found


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
    output is a sum of enough products."""
    by_winograd = is_plain_conv3x3(conv) and conv.in_channels % CHANNELS == 0
    return by_winograd or conv.weight[0].numel() >= LEAST_SUM


def filter_bytes(conv: nn.Conv2d) -> int:
    """Of conv's filters once they are laid out, the larger ones where there is a choice."""
    out_channels, channels, height, width = conv.weight.shape
    by_winograd = is_plain_conv3x3(conv) and channels % CHANNELS == 0
    numbers = POINTS if by_winograd else height * width
    return 4 * numbers * channels * -(-out_channels // COLUMNS) * COLUMNS
