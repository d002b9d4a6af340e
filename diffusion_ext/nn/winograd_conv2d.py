"""A convolution with torch.nn.Conv2d's parameters, which ours serve where they are faster."""

from __future__ import annotations

from torch import Tensor, nn

from .kept_filters import convolved


class WinogradConv2d(nn.Conv2d):
    """A drop-in for torch.nn.Conv2d, constructed as that; Conv2d itself wherever no kernel serves.

    On a CPU, where torch's result is channels_last. Without gradients: any filter without groups
    and dilation, its weight laid out once, where that gains on torch's (see `convolved`). With
    gradients, in float32: 3x3 filters of stride 1 and padding 1, by Winograd's minimal filtering
    (Lavin & Gray 2016), where C is a multiple of 16.
    """

    def forward(self, input: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K, H', W']
        y = convolved(self, input)
        return super().forward(input) if y is None else y
