"""Convolutions whose weights are laid out once: for networks that only infer, on a CPU."""

from __future__ import annotations

import copy
import weakref

import torch
from torch import Tensor, nn

from ..ops.backend import missing, needs_grad
from ..ops.conv2d import (
    CHANNELS,
    COLUMNS,
    POINTS,
    as_channels_last,
    conv2d,
    direct_filters,
    winograd_filters,
    winograd_is_faster,
)
from ..ops.conv3x3 import conv3x3
from ..ops.layouts import suggests_channels_last
from ..ops.memory import memory_available, memory_in_all

if "cpu" not in missing:
    from .._C import fingerprint

FREE = 4  # filters are laid out while one part in so many of the machine's memory stays free


class PackedConv2d:
    """A convolution of a weight that stays as it is, for calls without gradients.

    Its filters are laid out when the first images come: for Winograd's algorithm (Lavin & Gray
    2016) where that is faster for images of their number and size, else for the direct one; and
    anew where an operation in place has changed the weight. A copy shares them; a pickle has the
    weight alone, for filters lie as the processor wants them.

    Args:
        weight: [K, C, R, S], or [K, C] of a linear layer, or [C, K, R, R] of a transposed
            convolution of stride R; float32.
        batch: choose for so many images, whatever comes, so that no bit depends on their number.
        lanes: whether a skip, where there is one, begins at a multiple of 16 channels.
    """

    def __init__(
        self,
        weight: Tensor,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        transposed: bool = False,
        batch: int | None = None,
        lanes: bool = True,
    ):
        self.weight, self.stride, self.padding, self.batch = weight, stride, padding, batch
        self.shape = (*weight.shape, 1, 1)[:4]
        self.side = self.shape[2] if transposed else 1
        channels = self.shape[:2]
        self.channels, self.out_channels = channels if transposed else channels[::-1]
        plain = (*self.shape[2:], *stride, *padding) == (3, 3, 1, 1, 1, 1)
        # Size of the images -> whether by Winograd's algorithm, where that may serve.
        self.chosen = {} if plain and lanes and not transposed else None
        self.winograd = self.direct = self.version = None

    def __call__(self, x: Tensor, bias: Tensor | None, repeat: int = 1, **after) -> Tensor:
        """x, which `serves_conv2d`, [B, C, H, W] -> [B, K, H', W']; `after` as of `conv2d`."""
        batch, _, height, width = x.shape
        filters = self.lay_out(batch, height * repeat, width * repeat)
        return conv2d(
            x, filters, bias, self.out_channels, self.stride, self.padding,
            repeat=repeat, side=self.side, **after,
        )  # fmt: skip

    def lay_out(self, batch: int, height: int, width: int) -> Tensor:
        """The filters for so many images of that size."""
        if (version := version_of(self.weight)) != self.version:
            self.winograd, self.direct, self.version = None, None, version
        # What stays must not be an inference tensor, which later calls could not use everywhere.
        if self.by_winograd(self.batch or batch, height, width):
            if self.winograd is None:
                with torch.inference_mode(False):
                    self.winograd = winograd_filters(self.weight.detach())
            return self.winograd
        if self.direct is None:
            with torch.inference_mode(False):
                weight = self.weight.detach().view(self.shape)
                self.direct = direct_filters(weight, self.side > 1)
        return self.direct

    def by_winograd(self, *size: int) -> bool:
        if self.chosen is None:
            return False
        if size not in self.chosen:
            self.chosen[size] = winograd_is_faster(*size, self.channels, self.out_channels)
        return self.chosen[size]

    def __deepcopy__(self, memo) -> PackedConv2d:
        twin = copy.copy(self)
        twin.weight, laid_out = copy.deepcopy(self.weight, memo), version_of(self.weight)
        twin.version = version_of(twin.weight) if laid_out == self.version else None
        twin.winograd, twin.direct = self.winograd, self.direct
        return twin

    def __getstate__(self) -> dict:
        return self.__dict__ | {"winograd": None, "direct": None, "version": None}


def version_of(weight: Tensor) -> int:
    """What an operation in place raises; -1 of a weight of inference_mode, which has none."""
    return -1 if weight.is_inference() else weight._version


# Convolution -> its weight laid out, and what that weight was: beside the modules, whose copies,
# pickles and state dicts know nothing of it.
_packed: weakref.WeakKeyDictionary[nn.Conv2d, tuple[tuple, PackedConv2d]] = (
    weakref.WeakKeyDictionary()
)


def convolved(conv: nn.Conv2d, x: Tensor, repeat: int = 1, **after) -> Tensor | None:
    """conv(x), of x upsampled `repeat` times and with what is `after` it (see `conv2d`), by a
    convolution of ours; None where that is not to be had.

    It is to be had where `as_channels_last` says, by filters that stay laid out between calls; with
    gradients, or where memory is short, by `conv3x3` if conv is that and nothing else is asked for.
    """
    weight = conv._parameters.get("weight")
    images = as_channels_last(x, conv.weight if weight is None else weight)
    if images is None or not packs(conv):
        if _packed and not (weight is not None and weight.is_cpu and weight.dtype == torch.float32):
            forget(conv)  # it has moved
        return None
    if packed := _filters(conv, images, weight, after.get("residual")):
        return packed(images, conv._parameters.get("bias"), repeat, **after)
    if repeat == 1 and not after and is_plain_conv3x3(conv):
        return conv3x3(images, conv.weight, conv.bias)
    return None


def _filters(conv: nn.Conv2d, x: Tensor, weight, residual: Tensor | None) -> PackedConv2d | None:
    """conv's filters, for a call without gradients whose results are channels_last."""
    if torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
        return None
    if needs_grad(x, weight, conv._parameters.get("bias"), residual):
        forget(conv)  # it trains
        return None
    if residual is not None and (residual.is_contiguous() or not suggests_channels_last(residual)):
        return None  # torch's sum would lie as the residual does
    return _packed_as_it_is(conv, weight) if _is_dense(weight) else None


def forget(module: nn.Module) -> None:
    """Give back the memory of its filters, where it has some."""
    _packed.pop(module, None)


def _packed_as_it_is(conv: nn.Conv2d, weight: Tensor) -> PackedConv2d | None:
    """The filters of conv's weight as it is now; None where there is too little memory.

    What has changed is told by the version, which an operation in place raises, and by the address,
    the strides and the fingerprint of what was written past it, through `.data`: adapters are
    merged and averages are swapped in so.
    """
    address, filters = weight.data_ptr(), len(weight)
    how = weight.stride(), conv.stride, conv.padding
    key = version_of(weight), address, fingerprint(address, filters, weight.numel() // filters), how
    known, packed = _packed.get(conv, (None, None))
    if known == key:
        return packed
    if memory_available() < memory_in_all() // FREE + 4 * weight.nbytes:
        return None
    packed = PackedConv2d(weight.detach(), conv.stride, conv.padding)
    _packed[conv] = key, packed
    return packed


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


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


def filter_bytes(conv: nn.Conv2d) -> int:
    """Of conv's filters once they are laid out, the larger ones where there is a choice."""
    out_channels, channels, height, width = conv.weight.shape
    by_winograd = is_plain_conv3x3(conv) and channels % CHANNELS == 0
    numbers = POINTS if by_winograd else height * width
    return 4 * numbers * channels * -(-out_channels // COLUMNS) * COLUMNS
