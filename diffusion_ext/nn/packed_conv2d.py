"""Convolutions whose weights are laid out once: for networks that only infer, on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.conv2d import conv2d, direct_filters, winograd_filters, winograd_is_faster


class PackedConv2d:
    """A convolution of a weight that stays as it is, for calls without gradients.

    Its filters are laid out when the first images come: for Winograd's algorithm (Lavin & Gray
    2016) where that is faster for images of their number and size, else for the direct one; and
    anew where an operation in place has changed the weight. A copy shares them; a pickle has the
    weight alone, for filters lie as the processor wants them.

    Args:
        weight: [K, C, R, S], or [K, C] of a linear layer, or [C, K, R, R] of a transposed
            convolution of stride R.
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
        self.shape = (*weight.shape, 1, 1)[: max(4, weight.dim())]
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
        compiling = torch.compiler.is_compiling()  # a version cannot be asked for then
        if not compiling and (version := version_of(self.weight)) != self.version:
            self.drop()
            self.version = version
        # Another thread may set the attributes to None at any time.
        if self.by_winograd(self.batch or batch, height, width):
            if (filters := self.winograd) is None:
                filters = self.winograd = lasting(winograd_filters, self.weight.detach())
            return filters
        if (filters := self.direct) is None:
            weight = self.weight.detach().view(self.shape)
            filters = self.direct = lasting(direct_filters, weight, self.side > 1)
        return filters

    def drop(self) -> None:
        """Give back the filters; the next call lays them out anew."""
        self.winograd = self.direct = None

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


def lasting(make: Callable[..., Tensor], *arguments) -> Tensor:
    """What make gives, as no inference tensor, which later calls could not use everywhere."""
    if torch.compiler.is_compiling():
        return make(*arguments)
    with torch.inference_mode(False):
        return make(*arguments)


def version_of(weight: Tensor) -> int:
    """What an operation in place raises; -1 of a weight of inference_mode, which has none."""
    return -1 if weight.is_inference() else weight._version
