"""The works of the loss: with its gradient alone, and with the noising of a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import diffusion_ext as dx
from diffusion_ext.ops.denoising_loss import loss_and_gradient

from . import eager
from .eager import SCHEDULE
from .work import (
    DTYPES,
    EAGER_FACTOR,
    Case,
    Implementation,
    Work,
    compile_anew,
    copy_of_x,
    formula,
    ours,
)


def by_autograd(x_t, m, noise, loss_of=F.mse_loss) -> tuple:
    """(x_t, the mean squared error, its scaled gradient by m), by torch's own loss."""
    output = m.detach().requires_grad_()
    loss = loss_of(output, noise)
    return x_t, loss, torch.autograd.grad(loss, output, loss.new_tensor(_scale(m.numel())))[0]


def _scale(elements: int) -> int:
    """Of the gradient: that of the sum over the elements, as far as half precision can hold it."""
    return min(elements, 2**15)


# --- the loss and its gradient --------------------------------------------------------------------


def losses(case: Case) -> list[Work]:
    """Of a network that learns the noise, and of one that learns v."""
    return [loss_of(case, "epsilon"), loss_of(case, "v")]


def loss_of(case: Case, prediction: str) -> Work:
    """(loss, gradient) of the output m. Eager torch gets the target, which training has stored;
    ours makes it of x0 and the seeds."""
    device, (batch, *_) = torch.device(case.device), case.shape
    t = 1 + case.seeds() % SCHEDULE.timesteps
    names = {"epsilon": ("zero", "one"), "v": ("-sigma", "signal")}[prediction]
    tables = [SCHEDULE.tensor(name, device) for name in names]
    scale = _scale(torch.Size(case.shape).numel()) / batch
    upstream = torch.full((batch,), scale, device=device)

    def inputs():
        x0, seeds = case.draw(), case.seeds()
        target = {"epsilon": "noise"}.get(prediction, prediction)
        return case.draw(), dx.perturb(x0, t, SCHEDULE, seeds=seeds, target=target)[1], x0, seeds

    def eagerly(m, target, x0, seeds, of=F.mse_loss):
        return by_autograd(None, m, target, of)[1:]

    def compiled(*_):
        of = compile_anew(F.mse_loss)
        return lambda *inputs: eagerly(*inputs, of=of)

    def fused(m, target, x0, seeds):
        wide = m.dtype == torch.float64
        of_x0, of_noise = (table.double() if wide else table for table in tables)
        wanted = None if prediction == "epsilon" else x0
        args = (m, t, of_x0, of_noise, wanted, None, seeds, None, upstream.to(of_x0.dtype))
        losses, gradient = loss_and_gradient(*args)
        return losses.mean(), gradient

    return Work(
        op="denoising_loss",
        variant=f"{prediction}, noise made",
        case=case,
        inputs=inputs,
        implementations={
            "copy": copy_of_x(),
            "eager": formula(eagerly),
            "compiled": Implementation(compiled, factor=EAGER_FACTOR, compiles=True),
            **ours(fused),
        },
        exact=fused,
        passes=2 if prediction == "epsilon" else 3,
        eager_passes=5,
        backward=True,
    )


# --- with the noising -----------------------------------------------------------------------------


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
