"""Convolutions whose weights are laid out once: for networks that only infer, on a CPU."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..ops.backend import missing, needs_grad
from ..ops.conv2d import (
    CHANNELS,
    COLUMNS,
    POINTS,
    conv2d,
    direct_filters,
    serves_conv2d,
    winograd_filters,
    winograd_is_faster,
)
from ..ops.memory import memory_available, memory_in_all

if "cpu" not in missing:
    from .._C import fingerprint

FREE = 4  # filters are laid out while one part in so many of the machine's memory stays free
LINES = 1024  # of 64 bytes of a weight that are compared before each call, at least


class PackedConv2d:
    """A convolution of a weight that stays as it is, for calls without gradients.

    Its filters are laid out when the first images come: for Winograd's algorithm (Lavin & Gray
    2016) where that is faster for images of their number and size, else for the direct one. A copy
    shares them; a pickle has the weight alone, for filters lie as the processor wants them.

    Args:
        weight: [K, C, R, S], or [C, K, R, R] of a transposed convolution of stride R; float32.
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
        self.side = weight.shape[2] if transposed else 1
        channels = weight.shape[:2]
        self.channels, self.out_channels = channels if transposed else channels[::-1]
        plain = (*weight.shape[2:], *stride, *padding) == (3, 3, 1, 1, 1, 1)
        # Size of the images -> whether by Winograd's algorithm, where that may serve.
        self.chosen = {} if plain and lanes and not transposed else None
        self.winograd = self.direct = None

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
        if self.by_winograd(self.batch or batch, height, width):
            if self.winograd is None:
                self.winograd = winograd_filters(self.weight.detach())
            return self.winograd
        if self.direct is None:
            self.direct = direct_filters(self.weight.detach(), self.side > 1)
        return self.direct

    def by_winograd(self, *size: int) -> bool:
        if self.chosen is None:
            return False
        if size not in self.chosen:
            self.chosen[size] = winograd_is_faster(*size, self.channels, self.out_channels)
        return self.chosen[size]

    def __deepcopy__(self, memo) -> PackedConv2d:
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"winograd": None, "direct": None}


# Convolution -> (what its weight was, laid out): beside the modules, whose copies, pickles and
# state dicts know nothing of it.
_packed: weakref.WeakKeyDictionary[nn.Conv2d, tuple[tuple, PackedConv2d]] = (
    weakref.WeakKeyDictionary()
)


def convolved(conv: nn.Conv2d, x: Tensor, repeat: int = 1, **after) -> Tensor | None:
    """conv(x), of x upsampled `repeat` times and with what is `after` it (see `conv2d`), by filters
    that stay laid out between calls; None where that is not to be had.

    It is without gradients, where `serves_conv2d` and memory allows it. Before each call the weight
    is compared with the one that was laid out: its version, its address, and a fingerprint of at
    least 1024 lines of 16 numbers, which no averaged or merged weight has in common with another.
    """
    if torch.compiler.is_compiling() or not packs(conv):
        return None
    weight = conv._parameters.get("weight")
    if needs_grad(x, weight, conv.bias, after.get("residual")) or not _may_be_laid_out(weight):
        forget(conv)  # it trains, or has moved
        return None
    if type(x) is not Tensor or not serves_conv2d(x, weight) or not _is_channels_last(x, weight):
        return None
    if not (packed := _packed_as_it_is(conv, weight)):
        return None
    return packed(x, conv.bias, repeat, **after)


def forget(module: nn.Module) -> None:
    """Give back the memory of its filters, where it has some."""
    _packed.pop(module, None)


def _may_be_laid_out(weight) -> bool:
    """Whether weight is one whose changes can be noticed, where the kernels are."""
    if type(weight) is not nn.Parameter or weight.is_inference() or not weight.numel():
        return False
    return weight.is_cpu and weight.dtype == torch.float32 and _is_dense(weight)


def _is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether x, of weight's channels, was made so. Of one channel, or of one pixel, any tensor
    would pass for it, and get channels_last outputs where torch's are contiguous."""
    strides, (_, channels, *size) = x.stride(), x.shape
    if channels != weight.shape[1] or [channels, *size] == [1, 1, 1]:
        return False
    return (strides[1], strides[3]) == (1, channels)


def _packed_as_it_is(conv: nn.Conv2d, weight: Tensor) -> PackedConv2d | None:
    lines = max(LINES, 2 * len(weight))  # every filter has some, whose numbers lie together
    address, floats = weight.data_ptr(), weight.numel()
    how = weight.stride(), conv.stride, conv.padding
    key = weight._version, address, fingerprint(address, floats, lines), how
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
