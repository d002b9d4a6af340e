"""Modules that call torch's scaled dot-product attention, for which ours answers.

A module is known by its code, or its processor's, that names the function, and so no class of any
library has to be known. What it calls is what it says, whichever processor it has by then: while
its forward runs, a call of torch's function is ours where our kernels serve the tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops.attention import TIMED, attention_unchecked, serves_attention
from ..ops.backend import recorded
from ..ops.layouts import has_strides
from .stand_in import StandIn, swap_class

# torch's function, and that of diffusers which chooses among such functions.
CALLED = {"scaled_dot_product_attention", "dispatch_attention_fn"}


class FusedAttention(StandIn):
    """A module whose calls of F.scaled_dot_product_attention are served by our kernels."""

    def forward(self, *args, **kwargs):
        trains = self.training and torch.is_grad_enabled()
        if trains or torch.compiler.is_compiling() or recorded() or not TIMED:
            return super().forward(*args, **kwargs)
        with _OurAttention():
            return super().forward(*args, **kwargs)


class _OurAttention(TorchFunctionMode):
    """Answers calls of F.scaled_dot_product_attention inside it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            y = answered(*args, **kwargs)
            if y is not None:
                return y
        return func(*args, **kwargs)


def answered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """F.scaled_dot_product_attention by our kernels; None where torch's serves, or is to raise."""
    heads = (query, key, value)
    if dropout_p or enable_gqa or not all(has_strides(t) and t.dim() == 4 for t in heads):
        return None
    batch, count, _, size = query.shape
    if key.shape[:2] != (batch, count) or value.shape[:3] != key.shape[:3] or key.shape[3] != size:
        return None
    if not (query.dtype == key.dtype == value.dtype and key.is_cpu and value.is_cpu):
        return None
    if attn_mask is not None and (is_causal or not _fits(attn_mask, query, key)):
        return None
    if torch.is_autocast_enabled("cpu") or not serves_attention(*heads, attn_mask):
        return None
    scale = size**-0.5 if scale is None else float(scale)
    return attention_unchecked(*heads, attn_mask, scale, bool(is_causal))


def _fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether torch takes the mask."""
    dtypes = (torch.bool, torch.float32, query.dtype)
    if type(mask) is not Tensor or mask.dtype not in dtypes or not mask.is_cpu:
        return False
    shape = (*query.shape[:3], key.shape[2])
    sizes = zip(mask.shape[::-1], shape[::-1], strict=False)
    return mask.dim() in (2, 4) and all(size in (1, of) for size, of in sizes)


def fuse_attention(module: nn.Module) -> bool:
    """Fuse module, if it attends; whether it is fused."""
    if isinstance(module, FusedAttention):
        return True
    if isinstance(module, StandIn) or "forward" in module.__dict__ or not _attends(module):
        return False
    swap_class(module, FusedAttention)
    return True


def _attends(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    if callable(processor) and _names_it(type(processor).__call__):
        return True
    return _names_it(type(module).forward)


def _names_it(function) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and not CALLED.isdisjoint(code.co_names)
