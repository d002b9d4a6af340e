"""A 3x3 convolution with torch.nn.Conv2d's parameters, which ours serves where that is faster."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.conv3x3 import conv3x3


class WinogradConv2d(nn.Conv2d):
    """Conv2d of 3x3 filters with padding 1; a drop-in for it, and Conv2d wherever no kernel serves.

    By Winograd's minimal filtering (Lavin & Gray 2016), gradients too, in float32 on a CPU, where
    the input [B, C, H, W] is channels_last and C a multiple of 16: see `serves_conv3x3`.

    Args: in_channels, out_channels: C and K.
    Raises: what torch.nn.Conv2d raises.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K, H, W]
        return conv3x3(x, self.weight, self.bias)
