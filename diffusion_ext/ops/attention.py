"""attention: softmax(scale·q kᵀ + mask) v, no row of whose scores is ever whole in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_bool, check_device, check_floating, check_number, check_same_kind
from . import reference
from .backend import (
    CPU_CAPABILITY,
    current_backend,
    kernel,
    kernels,
    needs_grad,
    register_fake,
    serves_faster,
    transformed,
)
from .memory import memory_available

# Whether it is known where ours gain on torch's: of NEON it is not.
TIMED = CPU_CAPABILITY in ("avx2", "avx512")
LARGEST_HEAD = 2048  # that a tile of csrc/cpu/tiles.h holds
# Ours gain more than laying out the keys takes from so many keys of a head on, and from so many
# queries as it has numbers, but at least and at most so many, and of large heads a fourth.
# Measured on a Zen 4, one thread, heads of 1 to 512.
FEWEST_KEYS, QUERIES, LARGE = 8, (16, 64), 4
FREE = 4  # beyond 256 MiB, keys are laid out in at most one part in so many of the free memory


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017).

        y = softmax(scale·q kᵀ + mask) v

    Args:
        q: [B, H, Tq, d] or [B, Tq, d]. k: [B, H, Tk, d]. v: [B, H, Tk, dv]. Of one dtype and
            device. Any strides whose last is 1 are read as they lie: heads [B, T, H, d] are given
            as x.transpose(1, 2).
        mask: broadcast to [B, H, Tq, Tk]: bools, True where a key counts, or numbers that are added
            to the scores. scale: of the scores, 1/√d by default.
        causal: query i sees the keys up to i.

    A query to which no key counts gives zeros. On a CPU with AVX2 or AVX-512 blocks of scores stay
    in the cache (Rabe & Staats 2021; Dao et al. 2022), half precision is computed in float32, and
    no bit depends on the number of threads or on the rest of the batch. torch's
    scaled_dot_product_attention serves other devices, few queries and calls with gradients, since
    its backward wants what its own forward keeps. A thread lays out the keys and values of a head,
    in float32; where memory is short, torch's serves too.

    Returns: [B, H, Tq, dv] of q's dtype, with the strides of torch's on a CPU: as q lies where
        dv = d and the last stride of q, k and v is 1, else contiguous.
    Raises: TypeError, ValueError.
    """
    _check(q, k, v, mask, scale, causal)
    if q.dim() == 3:
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(1)
        heads = (t.unsqueeze(1) for t in (q.contiguous(), k, v))
        return attention(*heads, mask, scale, causal).squeeze(1)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(q.shape[2], k.shape[2])
    if serves_attention(q, k, v, mask):
        return attention_unchecked(q, k, v, mask, scale, causal)
    # torch's takes no mask beside causal, masks before it scales, and has no forward derivatives.
    not_torchs = causal and (mask is not None or scale <= 0)
    if not_torchs or current_backend() == "reference" or transformed():
        return reference.attention(q, k, v, mask, scale, causal)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, is_causal=causal)


def serves_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether our kernels serve heads [B, H, T, d], and gain on torch's."""
    return (
        TIMED
        and q.is_cpu
        and not torch.compiler.is_exporting()  # whose sizes may be left open
        and serves_faster(q)
        and not needs_grad(q, k, v, mask)
        and (mask is None or (mask.dtype != torch.float64 and mask.dim() in (2, 4)))
        and _gains(q.shape[2], k.shape[2], q.shape[3])
        and max(q.shape[3], v.shape[3]) <= LARGEST_HEAD
        and (torch.compiler.is_compiling() or _has_room(k.shape[2] * (q.shape[3] + v.shape[3])))
    )


def _gains(queries: int, keys: int, size: int) -> bool:
    least, most = QUERIES
    fewest = max(min(max(size, least), most), size // LARGE)
    return queries >= fewest and keys >= FEWEST_KEYS


def _has_room(numbers: int) -> bool:
    """Whether each thread may lay out so many float32 of a head."""
    size = 4 * numbers * torch.get_num_threads()
    return size <= 2**28 or size <= memory_available() // FREE


def attention_unchecked(q, k, v, mask, scale: float, causal: bool) -> Tensor:
    """`attention` of heads that `serves_attention`, known to be right."""
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    op = kernels().attention if torch.compiler.is_compiling() else kernel("attention")
    return op(q, k, v, mask, scale, causal)


def _check(q, k, v, mask, scale, causal) -> None:
    check_floating("q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"q: wanted shape [B, H, T, d] or [B, T, d], got {list(q.shape)}")
    if q.shape[-1] == 0:
        raise ValueError("q: wanted heads of at least 1 number, got 0")
    for name, tensor in (("k", k), ("v", v)):
        check_floating(name, tensor)
        check_same_kind(name, tensor, "q", q)
    batch = list(q.shape[:-2])
    if list(k.shape[:-2]) != batch or k.dim() != q.dim() or k.shape[-1] != q.shape[-1]:
        wanted = [*batch, "Tk", q.shape[-1]]
        raise ValueError(f"k: wanted shape {_shown(wanted)}, got {list(k.shape)}")
    if list(v.shape[:-1]) != list(k.shape[:-1]):
        wanted = [*k.shape[:-1], "dv"]
        raise ValueError(f"v: wanted shape {_shown(wanted)}, got {list(v.shape)}")
    if mask is not None:
        _check_mask(mask, q, [*q.shape[:-1], k.shape[-2]])
    if scale is not None:
        check_number("scale", scale)
    check_bool("causal", causal)


def _check_mask(mask, q: Tensor, shape: list[int]) -> None:
    if not (isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: wanted a tensor of bools or floating numbers, got {got}")
    check_device("mask", mask, q.device)
    fits = len(mask.shape) <= len(shape) and all(
        size in (1, of) for size, of in zip(mask.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"mask: wanted what broadcasts to {shape}, got {list(mask.shape)}")


def _shown(shape: list) -> str:
    return f"[{', '.join(map(str, shape))}]"


@register_fake("attention")
def _(q, k, v, mask, scale, causal):
    if v.shape[3] == q.shape[3] and all(t.stride(3) == 1 for t in (q, k, v)):
        return torch.empty_like(q)
    return q.new_empty(*q.shape[:3], v.shape[3])
