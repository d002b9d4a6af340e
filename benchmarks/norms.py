"""The works of group_norm_act."""

from __future__ import annotations

import dataclasses
import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

import diffusion_ext as dx

from . import eager
from .steps import baselines
from .work import Case, Implementation, Work, ours

GROUPS = 32
# DDPM and Stable Diffusion at batches of 8, 2 and 1; VAE decoders; 32 pixels; video.
NORM_SHAPES = [
    (8, 320, 64, 64),
    (8, 640, 32, 32),
    (8, 1280, 16, 16),
    (8, 1280, 8, 8),
    (2, 320, 64, 64),
    (1, 320, 64, 64),
    (1, 512, 64, 64),
    (1, 256, 256, 256),
    (1, 128, 512, 512),
    (64, 128, 32, 32),
    (1, 320, 16, 40, 64),
    (1, 128, 20, 128, 128),
]
# Small pictures, whose UNets have fewer groups (such as ContextUnet), and a VAE's last level.
MORE_SHAPES = {(32, 256, 16, 16): 8, (64, 64, 32, 32): 8, (1, 128, 256, 256): GROUPS}


def gradients(forward, x, weight, bias, dy):
    """The result, and the gradients of a forward with respect to its three inputs."""
    y = forward(x, weight, bias)
    return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy))


def with_gradients(implementation: Implementation) -> Implementation:
    """The same, forward and backward; only the forward is compiled, which brings its backward."""

    def make(x, weight, bias, dy):
        forward = implementation.make(x, weight, bias)
        return partial(gradients, forward)

    return dataclasses.replace(implementation, make=make)


def other_libraries(case: Case, groups: int) -> dict[str, Implementation]:
    """GroupNorm and SiLU of the libraries that are installed; theirs are for CUDA."""
    found = {}
    if case.device != "cuda" or len(case.shape) != 4:
        return found
    if importlib.util.find_spec("liger_kernel") and case.layout == "contiguous":
        from liger_kernel.ops.group_norm import LigerGroupNormFunction

        def liger(x, weight, bias):
            norm = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, 1e-5)
            return F.silu(norm)

        found["liger-kernel"] = Implementation(lambda *_: liger, factor=16)
    if importlib.util.find_spec("apex") and case.layout == "channels_last":
        from apex.contrib.group_norm import GroupNorm

        def apex(x, weight, bias):
            norm = GroupNorm(groups, x.shape[1], act="silu", device=x.device, dtype=x.dtype)
            norm.weight, norm.bias = map(torch.nn.Parameter, (weight, bias))
            return lambda x, weight, bias: norm(x)

        found["apex"] = Implementation(apex, factor=16)
    return found


def norms(case: Case, groups: int = GROUPS) -> list[Work]:
    """[forward, forward and backward]"""

    def group_norm(x, weight, bias):
        return dx.group_norm_act(x, groups, weight, bias)

    def eagerly(x, weight, bias):
        return eager.group_norm_silu(x, groups, weight, bias)

    def inputs():
        return case.draw(), case.draw(case.shape[1:2]), case.draw(case.shape[1:2])

    def inputs_with_gradients():
        return *(t.requires_grad_() for t in inputs()), case.draw()

    def described(direction):
        return f"{direction}, {groups} groups"

    common = {"op": "group_norm_act", "case": case}
    forward = Work(
        variant=described("forward"),
        inputs=inputs,
        implementations=baselines(eagerly, case) | other_libraries(case, groups) | ours(group_norm),
        exact=group_norm,
        passes=2,
        eager_passes=5,
        **common,
    )
    training = {
        name: with_gradients(implementation)
        for name, implementation in forward.implementations.items()
        # Those whose inputs are not the leaves that gradients are asked of.
        if name not in ("copy", "eager, float32", "apex")
    }
    both = Work(
        variant=described("forward + backward"),
        inputs=inputs_with_gradients,
        implementations={"copy": forward.implementations["copy"]} | training,
        exact=partial(gradients, group_norm),
        passes=5,
        backward=True,
        **common,
    )
    return [forward, both]
