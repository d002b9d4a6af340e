"""Convolutions of images that move, whose weights are laid out once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops.conv2d import CHANNELS
from ..ops.conv3d import THREE, conv3d
from .packed_conv2d import PackedConv2d


class PackedConv3d(PackedConv2d):
    """A PackedConv2d of a weight [K, C, T, R, S].

    To Winograd's algorithm the frames under a filter are further channels, and the outputs' frames
    further images.

    Args: stride, padding: of time, height and width.
    """

    def __init__(self, weight: Tensor, stride: THREE, padding: THREE):
        super().__init__(weight, stride, padding)
        _, channels, frames, *sides = weight.shape
        self.channels = channels * frames
        if is_of_winograd(channels, sides, stride):
            self.chosen = {}

    def __call__(self, x: Tensor, bias: Tensor | None, contiguous: bool = False) -> Tensor:
        """x [B, C, T, H, W] -> [B, K, T', H', W'], of either memory format."""
        filters = self.lay_out(*self.images(x))
        out_channels, how = self.out_channels, (self.stride, self.padding)
        return conv3d(x, filters, bias, out_channels, *how, contiguous=contiguous)

    def images(self, x: Tensor) -> tuple[int, int, int]:
        """Number and size of the outputs' frames."""
        sizes = zip(x.shape[2:], self.shape[2:], self.stride, self.padding, strict=True)
        frames, *size = ((n + 2 * pad - taps) // step + 1 for n, taps, step, pad in sizes)
        return len(x) * frames, *size


def is_of_winograd(channels: int, sides: Sequence[int], stride: THREE) -> bool:
    """Whether Winograd's algorithm can serve filters of so many channels, sides and strides."""
    return tuple(sides) == (3, 3) and stride[1:] == (1, 1) and channels % CHANNELS == 0
