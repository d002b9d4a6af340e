"""linear: linear layers on the CPU of weights that were laid out before, with what follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import NATIVE_DTYPES, kernel, kernels, register_fake, serves
from .conv2d import COLUMNS, VECTORISED, direct_filters
from .group_norm_act import ACTIVATIONS


def serves_linear(x: Tensor) -> bool:
    """Whether the kernel serves x [*, C]: of one of NATIVE_DTYPES on a CPU with AVX2, AVX-512 or
    NEON, the numbers of a row side by side."""
    return (
        VECTORISED
        and x.is_cpu
        and x.dtype in NATIVE_DTYPES
        and serves(x)  # before a size is asked for, which torch.jit.trace would write down
        and not torch.is_autocast_enabled("cpu")
        and x.dim() > 0
        and (x.stride(-1) == 1 or x.shape[-1] == 1)
    )


def linear_filters(weight: Tensor, gated: bool = False) -> Tensor:
    """weight [K, C] as `linear` multiplies with it, of its dtype; gated: [2K, C], values and then
    gates."""
    halves = weight.unflatten(0, (1 + gated, -1))[..., None]  # [halves, K, C, 1]
    return direct_filters(halves.permute(2, 1, 0, 3), transposed=True)


def linear_bytes(out_features: int, in_features: int, of_number: int = 4) -> int:
    """Of a weight [out_features, in_features] that is laid out, of numbers of so many bytes."""
    return of_number * in_features * -(-out_features // COLUMNS) * COLUMNS


def linear(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out_features: int,
    residual: Tensor | None = None,
    act: str = "identity",
    gated: bool = False,
) -> Tensor:
    """act(x W^T + bias) + residual, without gradients.

    Gated: values · act(gates) of [values, gates] = x W^T + bias, as GEGLU and SwiGLU (Shazeer
    2020) are; the halves are not written down. Half precision is computed in float32 and rounded
    once, at the end.

    Args:
        x: [*, C], which `serves_linear`. filters: what `linear_filters` made of the weight.
        bias: [K], gated [2K], or None. out_features: K. residual: [*, K] or None, which it is where
            gated. All of x's dtype. act: one of group_norm_act's.

    Returns: [*, K], contiguous. No bit of a row depends on the others, or on the threads.
    """
    op = kernels().linear if torch.compiler.is_compiling() else kernel("linear")
    return op(x, filters, bias, residual, out_features, ACTIVATIONS.index(act), gated)


@register_fake("linear")
def _(x, filters, bias, residual, out_channels, act, gated):
    return x.new_empty(*x.shape[:-1], out_channels)
