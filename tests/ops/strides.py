"""Tensors of any strides: what sizes of 1, permutations, slices and expansions make by accident."""

from __future__ import annotations

import random

import torch

KINDS = ("contiguous", "channels last", "permuted", "permuted", "sliced", "expanded", "any strides")


def with_random_strides(draw: random.Random, shape, dtype=torch.float32) -> torch.Tensor:
    """Normals of a shape, which lie in one of KINDS of ways."""
    kind, dims = draw.choice(KINDS), len(shape)
    order = list(range(dims))  # the dimensions by their strides, the longest first
    if kind == "channels last":
        order = [0, *range(2, dims), 1][:dims]
    elif kind != "contiguous":
        draw.shuffle(order)
    if kind == "any strides":
        return _of_any_strides(draw, shape, dtype)
    sizes, picks = list(shape), []
    for size in shape:
        begin, step = (draw.randint(0, 1), draw.randint(1, 2)) if kind == "sliced" else (0, 1)
        picks.append(slice(begin, begin + size * step, step))
    if kind == "sliced":
        sizes = [pick.stop + draw.randint(0, 1) for pick in picks]
    if kind == "expanded":
        sizes = [1 if draw.random() < 0.4 else size for size in shape]
    x = torch.randn([sizes[d] for d in order]).to(dtype)
    x = x.permute([order.index(d) for d in range(dims)])
    return x.expand(shape) if kind == "expanded" else x[tuple(picks)]


def _of_any_strides(draw: random.Random, shape, dtype) -> torch.Tensor:
    """Elements may lie over each other, and sizes of 1 have strides that mean nothing."""
    strides = [draw.choice([0, 1, 1, 2, 3, 4, 6, 12, 24, 60]) for _ in shape]
    return lying_as(torch.empty_strided(shape, strides, dtype=dtype))


def lying_as(x: torch.Tensor) -> torch.Tensor:
    """Other numbers of x's shape, dtype and strides."""
    last = sum(max(size - 1, 0) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.randn(last + 1).to(x.dtype).as_strided(x.shape, x.stride())


def told(**tensors) -> str:
    """The shapes and strides of a case that failed."""
    return ", ".join(
        f"{n} {tuple(t.shape)} {t.stride()}" for n, t in tensors.items() if t is not None
    )
