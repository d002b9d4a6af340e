"""Linear layers whose weights are laid out once, kept between calls, and laid out anew when they
change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.backend import NATIVE_DTYPES, needs_grad
from ..ops.conv2d import SHARES_OF_TORCH, TIMED
from ..ops.layouts import has_strides
from ..ops.linear import linear, linear_bytes, linear_filters, serves_linear
from .kept_filters import LEAST_OF_SLOW, is_slow_of_torch
from .kept_weights import (
    Kept,
    can_be_laid_out,
    forget,
    forget_if_moved,
    holds_its_numbers,
    is_plain,
    keep,
    kept_of,
)
from .packed_conv2d import lasting

# What a layer of ours has to be for it to gain on torch's: products for each output, and in all.
# Measured on a Zen 4 with AVX-512, one thread: of 320 channels to 320 and of 768 to 768, two rows
# take 1.0 and 0.6 of torch's time, four 0.9 and 0.5, a hundred and more 0.9, and of 128 channels to
# 128 never less than torch's. With AVX2 it is the same.
LEAST_SUM, LEAST_PRODUCTS = 256, 400_000
# And outputs, of which ours compute a vector at a time: of 1024 channels to 1, 2 and 4 they take
# 3.9, 1.5 and 1.3 of torch's time.
LEAST_OUTPUTS = 16
# Of half types that the processor multiplies itself, the most rows that ours gain on: of one they
# take 0.4 of torch's time, of eight 0.85, of sixteen 1.15, and of hundreds twice it.
MOST_OF_FAST = 8


class PackedLinear:
    """A linear layer of a weight that stays as it is, for calls without gradients.

    Args: weight: [K, C], gated [2K, C].
    """

    def __init__(self, weight: Tensor, gated: bool):
        self.weight, self.gated, self.filters = weight, gated, None

    def __call__(self, x: Tensor, bias: Tensor | None, **after) -> Tensor:
        """x [*, C], which `serves_linear` -> [*, K]; `after` as of `linear`."""
        if (filters := self.filters) is None:  # as another thread may set it at any time
            filters = self.filters = lasting(linear_filters, self.weight, self.gated)
        out_features = len(self.weight) // (1 + self.gated)
        return linear(x, filters, bias, out_features, gated=self.gated, **after)

    def drop(self) -> None:
        """Give back what is laid out; the next call does it anew."""
        self.filters = None


def projected(layer: nn.Linear, x: Tensor, gated: bool = False, **after) -> Tensor | None:
    """layer(x) with what is `after` it (see `linear`), by our kernel; None where that is not to be
    had, or torch is as fast.

    It is to be had on a CPU where ours are `TIMED`, without gradients, in float32 and in the half
    types of which torch's products are slow. torch.compile and exported programs have torch's.
    """
    weight = layer._parameters.get("weight")
    if not TIMED or not has_strides(x) or x.dtype not in NATIVE_DTYPES or not x.is_cpu:
        forget_if_moved(layer, weight)
        return None
    if weight is None or torch.compiler.is_compiling():
        return None
    bias, residual = layer._parameters.get("bias"), after.get("residual")
    if needs_grad(x, weight, bias, residual):
        forget(layer)  # it trains
        return None
    if is_slow_of_torch(x.dtype) and x.dim() > 0 and x.stride(-1) != 1:
        x = x.contiguous()  # a copy takes less time than torch's products
    if not serves_linear(x) or not _gains(x, len(weight)):
        return None
    if x.dtype != weight.dtype or (residual is not None and residual.dtype != x.dtype):
        return None
    if not is_plain(layer, weight):
        return None
    if x.shape[-1] != weight.shape[-1] or (kept := _kept_of(layer, weight, gated)) is None:
        return None  # of the first, as of other dtypes, torch makes its error
    if not holds_its_numbers(kept, weight):
        forget(layer)  # memory is short
        return None
    return kept.packed(x, bias, **after)


def is_worth_it(layer: nn.Linear, x: Tensor) -> bool:
    """Whether `projected` of layer and x is to be had, as far as a glance tells."""
    if not TIMED or not has_strides(x) or torch.compiler.is_compiling():
        return False
    if needs_grad(x, layer._parameters.get("weight")) or not serves_linear(x):
        return False
    return _gains(x, layer.out_features)


def _gains(x: Tensor, out_features: int) -> bool:
    """Whether ours take less time than torch's, of x [*, C], which `serves_linear`."""
    least = LEAST_PRODUCTS if x.dtype == torch.float32 else LEAST_OF_SLOW
    if x.dtype in SHARES_OF_TORCH and x.numel() > MOST_OF_FAST * x.shape[-1]:
        return False
    return x.numel() * out_features >= least


def _kept_of(layer: nn.Linear, weight: Tensor, gated: bool) -> Kept | None:
    """What is kept of layer; None where nothing can be."""

    def make(of: tuple) -> Kept | None:
        dense = weight.dim() == 2 and weight.is_contiguous() and weight.numel() > 0
        if not dense or not can_be_laid_out(weight):
            return None
        return Kept(of, PackedLinear(weight.detach(), gated))

    settings = weight.shape, weight.stride(), weight.dtype, gated
    return keep(layer, kept_of(layer), weight, settings, make)


def may_gain(layer: nn.Linear) -> bool:
    """Whether ours gain on torch's for some number of rows."""
    slow = is_slow_of_torch(layer.weight.dtype)
    return layer.out_features >= LEAST_OUTPUTS and (layer.in_features >= LEAST_SUM or slow)


def weight_bytes(layer: nn.Linear) -> int:
    """Of layer's weight once it is laid out."""
    return linear_bytes(layer.out_features, layer.in_features, layer.weight.element_size())
