"""denoising_loss: how far a model's output is from its target, which is never stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .backend import kernels, needs_grad, register_fake, serves
from .layouts import empty_sum


def loss_by_table(
    model_output: Tensor,
    t: Tensor,
    of_x0: Tensor,
    of_noise: Tensor,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """The op, unchecked: the losses [B] of model_output - (of_x0[t]·x0 + of_noise[t]·ε).

    Args: see `reference.denoising_loss`; of_x0, of_noise: float32 (float64 for a float64 output);
        x0, noise: in the output's dtype or both float32. Differentiable.
    """
    args = (model_output, t, of_x0, of_noise, x0, noise, seeds)
    if not serves(model_output) or needs_grad(x0, noise):
        return reference.denoising_loss(*args, delta)
    if needs_grad(model_output):
        return _DenoisingLoss.apply(*args, delta)
    return kernels().denoising_loss(*args, None, delta)[0]


def loss_and_gradient(
    model_output, t, of_x0, of_noise, x0, noise, seeds, delta, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses [B], and the gradient of Σ_b upstream_b·loss_b by model_output, in one pass.

    Args: as `loss_by_table`; upstream: float32 [B] (float64 for a float64 output).
    """
    args = (model_output.detach(), t, of_x0, of_noise, x0, noise, seeds)
    if serves(model_output):
        return kernels().denoising_loss(*args, upstream, delta)
    with torch.enable_grad():
        output = args[0].requires_grad_()
        losses = reference.denoising_loss(output, *args[1:], delta)
        (gradient,) = torch.autograd.grad(losses, output, upstream)
    return losses.detach(), gradient


class _DenoisingLoss(torch.autograd.Function):
    """The gradient is made with the loss, when noise and output are at hand: on a CPU the noise
    takes longer to make again than a gradient takes to scale. Where the backward ran the
    kernel again, the whole took 1.05 to 1.6 times as long (on a Zen 4)."""

    @staticmethod
    def forward(ctx, model_output, t, of_x0, of_noise, x0, noise, seeds, delta):
        args = (model_output, t, of_x0, of_noise, x0, noise, seeds)
        # Of the sum over the elements: that of their mean is too small for float16.
        size = _size(model_output)
        upstream = model_output.new_full(model_output.shape[:1], size, dtype=torch.float32)
        losses, gradient = kernels().denoising_loss(*args, upstream, delta)
        ctx.save_for_backward(gradient, *args)
        ctx.delta = delta
        return losses

    @staticmethod
    def backward(ctx, upstream):
        gradient, model_output, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient with a gradient
            output = model_output.view_as(model_output)
            losses = reference.denoising_loss(output, *rest, ctx.delta)
            (scaled,) = torch.autograd.grad(losses, output, upstream, create_graph=True)
        else:
            scaled = _scaled(gradient, upstream / max(_size(gradient), 1))
        return scaled, *[None] * 7


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Each sample of x by its float32 factor, rounded once, to x's dtype."""
    factors = factors.reshape(-1, *[1] * (x.dim() - 1))
    if x.is_cuda:  # whose kernel converts as it goes; a CPU's makes float32 tensors either way
        return torch.mul(x, factors, out=torch.empty_like(x))
    return (x * factors).to(x.dtype)


def _size(x: Tensor) -> int:
    """The elements of a sample."""
    return math.prod(x.shape[1:])


@register_fake("denoising_loss")
def _(model_output, t, of_x0, of_noise, x0, noise, seeds, upstream, delta):
    losses = model_output.new_empty(model_output.shape[:1], dtype=torch.float32)
    wanted = upstream is not None
    return losses, empty_sum(model_output) if wanted else model_output.new_empty(0)
