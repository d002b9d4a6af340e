"""Other people's classes, recognised by what their forward does rather than by their name.

A forward is known if it compiles to the same instructions as one of the templates here and its
global names mean the same things: no guess, and no need of the package that it comes from.
"""

from __future__ import annotations

import functools
from types import FunctionType

import torch
from torch import nn
from torch.nn import functional as F


class _Float32Norm(nn.GroupNorm):
    """The statistics, and all else, in float32; the result in the input's dtype."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)

    def with_to(self, x):
        return super().forward(x.float()).to(x.dtype)


class _Swish:
    def forward(self, x):
        return x * torch.sigmoid(x)

    def swapped(self, x):
        return torch.sigmoid(x) * x

    def method(self, x):
        return x * x.sigmoid()

    def functional(self, x):
        return F.silu(x)


@functools.cache
def is_float32_norm(cls: type) -> bool:
    """Whether cls is a GroupNorm that only adds the casts to float32 and back."""
    return cls.__bases__ == (nn.GroupNorm,) and _forward_is_one_of(cls, _Float32Norm)


@functools.cache
def is_swish(cls: type) -> bool:
    """Whether cls is a module x·sigmoid(x)."""
    return cls.__bases__ == (nn.Module,) and _forward_is_one_of(cls, _Swish)


def _forward_is_one_of(cls: type, templates: type) -> bool:
    forward = vars(cls).get("forward")
    known = [f for f in vars(templates).values() if isinstance(f, FunctionType)]
    return isinstance(forward, FunctionType) and any(_same(forward, f) for f in known)


def _same(forward: FunctionType, template: FunctionType) -> bool:
    a, b = forward.__code__, template.__code__
    if (a.co_code, a.co_names, a.co_argcount) != (b.co_code, b.co_names, b.co_argcount):
        return False
    if a.co_freevars != b.co_freevars or forward.__defaults__ or _numbers(a) != _numbers(b):
        return False
    return all(
        forward.__globals__.get(name) is value
        for name, value in template.__globals__.items()
        if name in b.co_names
    )


def _numbers(code) -> list:
    """The constants but a docstring, which says nothing of what the code does."""
    return [c for c in code.co_consts if c is not None and not isinstance(c, str)]
