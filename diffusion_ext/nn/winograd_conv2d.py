"""A convolution with torch.nn.Conv2d's parameters, which ours serves where that is faster."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.conv3x3 import conv3x3


class WinogradConv2d(nn.Conv2d):
    """A drop-in for torch.nn.Conv2d, constructed as that; Conv2d itself wherever no kernel serves.

    3x3 filters of stride 1 and padding 1 run by Winograd's minimal filtering (Lavin & Gray 2016),
    gradients too, in float32 on a CPU, where the input [B, C, H, W] is channels_last and C a
    multiple of 16: see `serves_conv3x3`.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K, H, W]
        if is_plain_conv3x3(self):
            return conv3x3(x, self.weight, self.bias)
        return super().forward(x)


def is_plain_conv3x3(conv: nn.Conv2d) -> bool:
    """Whether conv is what conv3x3 computes: 3x3 filters, zeros around, an output for a pixel."""
    return (
        (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )  # fmt: skip
