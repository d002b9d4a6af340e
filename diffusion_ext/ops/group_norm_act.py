"""group_norm_act: GroupNorm, its modulations and the activation in one op, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_device, check_floating, check_number
from . import reference
from .backend import kernel, kernels, needs_grad, recorded, register_fake, serves_faster
from .layouts import layout_of_norm

# The kernels take an activation as its index here (csrc/math/activation.h has the same order).
ACTIVATIONS = tuple(reference.ACTIVATIONS)
MODULATIONS = ("scale", "shift", "post_scale", "post_shift", "pre_shift")


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    post_scale: Tensor | None = None,
    post_shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
) -> Tensor:
    """GroupNorm (Wu & He 2018), modulation and activation in one read and one write of x.

        y = act((1 + scale)·GroupNorm(x + pre_shift) + shift)·post_scale + post_shift

    Args:
        x: [N, C, *spatial]. Contiguous and channels_last (of 4-D and 5-D) are read as they lie;
            any other strides are copied first.
        num_groups: G, which divides C. weight, bias: [C] or None. eps: added to the variance.
        act: "identity", "relu", "silu", "gelu" (erf), "gelu_tanh" or "mish" (Misra 2019).
        scale, shift, post_scale, post_shift, pre_shift: [N, C] or None, in any floating dtype:
            adaptive normalisation before the activation, FiLM after it (Perez et al. 2018), and a
            bias per sample (a time embedding) before the statistics.

    Statistics are float32 around a shift, so a mean far from zero costs no accuracy. For the
    backward only x, the mean and 1/std are kept. With create_graph=True the gradient is the
    reference's, which can be differentiated again.

    Returns: y, of x's shape and dtype, with the strides of act(F.group_norm(x)) on a CPU:
        channels_last where x suggests it, contiguous otherwise. On a GPU too, where F.group_norm
        alone would make it contiguous. Raises: TypeError, ValueError.
    """
    modulation = (scale, shift, post_scale, post_shift, pre_shift)
    _check(x, num_groups, weight, bias, eps, act, modulation)
    if not 3 <= x.dim() <= 5:  # kernels know those
        shape, x = x.shape, x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        return group_norm_act(x, num_groups, weight, bias, eps, act, *modulation).reshape(shape)
    args = (x, num_groups, weight, bias, eps, act, *modulation)
    if serves_faster(x):
        return group_norm_act_unchecked(*args)
    # Other runtimes know a GroupNorm of torch's, and have a kernel for it.
    normalise = _group_norm_of_torch if recorded() else None
    return reference.group_norm_act(*args, normalise)


def _group_norm_of_torch(x: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.group_norm(x, num_groups, eps=eps)


def group_norm_act_unchecked(x, num_groups, weight, bias, eps, act, *modulation) -> Tensor:
    """`group_norm_act` of arguments that are known to be right, with an x that a kernel serves.

    What a kernel would read out of bounds it refuses itself.
    """
    return with_statistics(x, num_groups, weight, bias, eps, act, *modulation)[0]


def with_statistics(x, num_groups, weight, bias, eps, act, *modulation):
    """The same: y, and of each group mean (float64) and 1/√(variance + eps) [N, G], which have no
    gradients."""
    if torch.is_grad_enabled() and needs_grad(x, weight, bias, *modulation):
        return _GroupNormAct.apply(x, num_groups, weight, bias, eps, act, *modulation)
    op = kernels().group_norm_act if torch.compiler.is_compiling() else kernel("group_norm_act")
    return op(x, num_groups, weight, bias, eps, ACTIVATIONS.index(act), *modulation)


class _GroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, act, *modulation):
        act_index = ACTIVATIONS.index(act)
        args = (x, num_groups, weight, bias, eps, act_index, *modulation)
        y, mean, rstd = kernels().group_norm_act(*args)
        ctx.save_for_backward(x, mean, rstd, weight, bias, *modulation)
        ctx.num_groups, ctx.eps, ctx.act = num_groups, eps, act
        ctx.mark_non_differentiable(mean, rstd)
        return y, mean, rstd

    @staticmethod
    def backward(ctx, dy, *_):
        x, mean, rstd, *parameters = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        if torch.is_grad_enabled():  # create_graph=True: a gradient with a gradient
            gradients = _reference_gradients(ctx, dy, [x, *parameters], wanted)
        else:
            weight, bias, *modulation = parameters
            act_index = ACTIVATIONS.index(ctx.act)
            gradients = kernels().group_norm_act_backward(
                dy, x, mean, rstd, ctx.num_groups, weight, bias, act_index, *modulation
            )
        gradients = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        dx, dweight, dbias, *dmodulation = gradients
        return dx, None, dweight, dbias, None, None, *dmodulation


# The places of the tensors among the arguments of _GroupNormAct.forward.
_DIFFERENTIABLE = (0, 2, 3, 6, 7, 8, 9, 10)


def _reference_gradients(ctx, dy, inputs, wanted):
    """The wanted gradients of x, weight, bias and the modulations, as a graph of torch's.

    Of aliases: an input may have been computed from another, whose gradient that path has no part
    in here.
    """
    inputs = [None if t is None else t.view_as(t) for t in inputs]
    x, weight, bias, *modulation = inputs
    y = reference.group_norm_act(x, ctx.num_groups, weight, bias, ctx.eps, ctx.act, *modulation)
    leaves = [t for t, w in zip(inputs, wanted, strict=True) if w]
    gradients = iter(torch.autograd.grad(y, leaves, dy, create_graph=True))
    return [next(gradients) if w else None for w in wanted]


def _check(x, num_groups, weight, bias, eps, act, modulation) -> None:
    check_floating("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x: wanted shape [N, C, *spatial], got {list(shape)}")
    batch, channels = shape[0], shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups: wanted an int, got {type(num_groups).__name__}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: wanted a divisor of the {channels} channels, got {num_groups}"
        )
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps: wanted a number above 0, got {eps}")
    check_choice("act", act, ACTIVATIONS)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_parameter(name, tensor, (channels,), "[C]", x)
    for name, tensor in zip(MODULATIONS, modulation, strict=True):
        if tensor is not None:
            _check_parameter(name, tensor, (batch, channels), "[N, C]", x)


def _check_parameter(name: str, tensor, shape: tuple[int, ...], meaning: str, x: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(
            f"{name}: wanted shape {meaning} = {list(shape)}, got {list(tensor.shape)}"
        )
    check_device(name, tensor, x.device)


@register_fake("group_norm_act")
def _(x, num_groups, weight, bias, eps, act, scale, shift, post_scale, post_shift, pre_shift):
    stats = (x.shape[0], num_groups)
    mean = x.new_empty(stats, dtype=torch.float64)
    y = _normalised_like(x, ACTIVATIONS[act] != "identity")
    return y, mean, x.new_empty(stats, dtype=torch.float32)


@register_fake("group_norm_act_backward")
def _(dy, x, mean, rstd, num_groups, weight, bias, act, *modulation):
    def like(parameter):
        return None if parameter is None else x.new_empty(parameter.shape, dtype=parameter.dtype)

    return _normalised_like(x, False), *(like(p) for p in (weight, bias, *modulation))


def _normalised_like(x: Tensor, activated: bool) -> Tensor:
    if any(isinstance(size, torch.SymInt) for size in x.shape):  # is not to be compared
        return torch.empty_like(x)
    layout = layout_of_norm(x, activated)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)
