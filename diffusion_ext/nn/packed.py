"""oneDNN's convolutions with packed weights, which torch has on most CPUs."""

from __future__ import annotations

import torch
from torch import Tensor


class Packed:
    """A convolution whose weights lie as oneDNN wants them, and the activation in the same pass.

    Args:
        weight: [K, C/groups, h, w], on the CPU. bias: [K]. padding: of both sides.
        shape: of the inputs [B, C, H, W] that the weights are laid out for.
        gelu: whether GELU follows.

    A copy shares the weights, which nothing writes to.
    """

    def __init__(self, weight, bias, shape, padding: int = 1, groups: int = 1, gelu: bool = False):
        self.how = ([padding] * 2, [1, 1], [1, 1], groups)  # the stride and the dilation are 1
        self.act = ("gelu", [], "none") if gelu else ("none", [], "")
        self.bias = bias
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), *self.how, list(shape)
        )

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether this torch and this CPU have it for such weights."""
        ops, names = torch.ops.mkldnn, ("_convolution_pointwise", "_reorder_convolution_weight")
        if weight.device.type != "cpu" or not all(hasattr(ops, name) for name in names):
            return False
        if weight.dtype == torch.bfloat16:
            return ops._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, K, H', W'], both channels_last"""
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.how, *self.act
        )

    def __deepcopy__(self, memo) -> Packed:
        return self
