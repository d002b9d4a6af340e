"""The work of a training step around its network: noising, and the loss with its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import diffusion_ext as dx
from diffusion_ext.ops.denoising_loss import loss_and_gradient

from . import eager
from .eager import SCHEDULE
from .work import DTYPES, Case, Implementation, Work, copy_of_x, formula, ours


def by_autograd(x_t, m, noise) -> tuple:
    """(x_t, the mean squared error, its scaled gradient by m), by torch's own loss."""
    output = m.detach().requires_grad_()
    loss = F.mse_loss(output, noise)
    return x_t, loss, torch.autograd.grad(loss, output, loss.new_tensor(_scale(m.numel())))[0]


def _scale(elements: int) -> int:
    """Of the gradient: that of the sum over the elements, as far as half precision can hold it."""
    return min(elements, 2**15)


def objectives(case: Case) -> list[Work]:
    """x_t, loss and gradient, from x0, the output m, and noise that is drawn on the way."""
    device, (batch, *_) = torch.device(case.device), case.shape
    t = 1 + case.seeds() % SCHEDULE.timesteps
    rows = {
        d: [SCHEDULE.tensor(name, device, d)[t] for name in ("signal", "sigma")]
        for d in DTYPES.values()
    }
    zero, one = (SCHEDULE.tensor(name, device) for name in ("zero", "one"))
    scale = _scale(torch.Size(case.shape).numel()) / batch
    upstream = torch.full((batch,), scale, device=device)

    def eagerly(x0, m, _):
        x_t, noise = eager.perturb(x0, *rows[x0.dtype])
        return by_autograd(x_t, m, noise)

    def stored(x0, m, seeds):
        return by_autograd(*_between(m, dx.perturb(x0, t, SCHEDULE, seeds=seeds)))

    def fused(x0, m, seeds):
        x_t, _ = dx.perturb(x0, t, SCHEDULE, seeds=seeds, target=None)
        tables = (zero, one) if m.dtype != torch.float64 else (zero.double(), one.double())
        of_losses = upstream.to(tables[0].dtype)
        losses, gradient = loss_and_gradient(m, t, *tables, None, None, seeds, None, of_losses)
        return x_t, losses.mean().to(m.dtype), gradient

    def exact(x0, m, seeds, draw=None):
        noise = {"noise": draw(x0)} if draw else {"seeds": seeds}
        return by_autograd(*_between(m, dx.perturb(x0, t, SCHEDULE, **noise)))

    work = Work(
        op="denoising_loss",
        variant="noising, loss and gradient",
        case=case,
        inputs=lambda: (case.draw(), case.draw(), case.seeds()),
        implementations={
            "copy": copy_of_x(),
            "eager": formula(eagerly),
            "ours, noise stored": Implementation(lambda *_: stored, noise="seeds", factor=16),
            **ours(fused),
        },
        exact=exact,
        passes=4,
        random=True,
        backward=True,
    )
    return [work]


def _between(m, noised: tuple) -> tuple:
    x_t, noise = noised
    return x_t, m, noise
