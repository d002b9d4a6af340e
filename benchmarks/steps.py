"""The works of sampler_step, perturb and philox_normal."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch

import diffusion_ext as dx

from . import eager
from .eager import SCHEDULE
from .work import DTYPES, Case, Implementation, Work, compiled, copy_of_x, formula, in_float32, ours

BY_X0 = "eager, by x0"


def baselines(call, case: Case, **options) -> dict[str, Implementation]:
    """A copy; a formula in eager torch, in float32 too where the work is not; and compiled."""
    found = {"copy": copy_of_x(), "eager": formula(call)}
    if case.dtype != "float32":
        found["eager, float32"] = in_float32(call)
    return found | {"compiled": compiled(call, **options)}


# --- sampler_step ---------------------------------------------------------------------------------


def one_row(timestep: int, clip: float | None = None, **weights: float) -> dx.StepTable:
    columns = [weights.get(name, 0.0) for name in dx.samplers.COLUMNS]
    return dx.StepTable(np.array([timestep]), np.array([columns]), clip, SCHEDULE.timesteps)


@functools.cache
def tables() -> dict[str, dx.StepTable]:
    """The rows that eager.py's formulas are."""
    kx, km = 1 / eager.SIGNAL, -eager.SIGMA / eager.SIGNAL
    ddpm, row = dx.ddpm(SCHEDULE), SCHEDULE.timesteps - eager.STEP
    weights = dict(zip(dx.samplers.COLUMNS, ddpm.weights[row].tolist(), strict=True))
    ddim = {"kx": kx, "km": km, "a0": eager.NEXT_SIGNAL, "am": eager.NEXT_SIGMA}
    return {
        "DDIM": one_row(eager.STEP, **ddim),
        "DDIM + clip": one_row(eager.STEP, eager.CLIP, **ddim),
        "DDPM": one_row(eager.STEP, **weights),
    }


def stepper(name: str, device: str):
    """step(x, m, noise, seeds, guidance) by a row of tables()."""
    table = tables()[name]
    row = torch.zeros((), dtype=torch.int64, device=device)

    def step(x, m, noise=None, seeds=None, guidance=1.0):
        tensors = table.tensors(x.device, x.dtype)
        return dx.sampler_step(
            x, m, *tensors, row, noise, seeds, clip=table.clip, guidance=guidance
        )

    return step


def from_diffusers(case: Case, name: str, **options) -> dict[str, Implementation]:
    """step(x, m, noise) of a scheduler of diffusers with our schedule; {} where that is missing."""
    plain = (case.dtype, case.layout) == ("float32", "contiguous")
    if not plain or importlib.util.find_spec("diffusers") is None:
        return {}
    import diffusers

    # Its index t is our t + 1, and the product of the alphas has to be our alpha_bar.
    betas = np.concatenate([[1 - SCHEDULE.alpha_bar[1]], SCHEDULE.beta[2:]])
    scheduler = getattr(diffusers, name)(
        len(betas), trained_betas=betas.astype(np.float32), **{"clip_sample": False, **options}
    )
    if name == "DDIMScheduler":
        scheduler.set_timesteps(SCHEDULE.timesteps // (eager.STEP - eager.PREVIOUS))

    def step(x, m, *_):
        return scheduler.step(m, eager.STEP - 1, x, return_dict=False)[0]

    return {"diffusers": formula(step, factor=64)}  # its tables are products in float32


def ddim(case: Case, name: str, by, passes: int, **options) -> Work:
    step = stepper(name, case.device)
    return Work(
        op="sampler_step",
        variant=f"{name}, no noise",
        case=case,
        inputs=lambda: (case.draw(), case.draw()),
        implementations=baselines(by, case)
        | from_diffusers(case, "DDIMScheduler", **options)
        | ours(step),
        exact=step,
        passes=3,
        eager_passes=passes,
    )


def ddpm_given(case: Case) -> Work:
    step = stepper("DDPM", case.device)
    return Work(
        op="sampler_step",
        variant="DDPM, noise given",
        case=case,
        inputs=lambda: (case.draw(), case.draw(), case.draw()),
        implementations=baselines(eager.ddpm, case)
        | {BY_X0: formula(eager.ddpm_by_x0)}
        | ours(step),
        exact=step,
        passes=4,
        eager_passes=19,
    )


def ddpm_made(case: Case, guided: bool) -> Work:
    """With guidance the model's output has two halves; a scheduler of diffusers leaves that out."""
    step = stepper("DDPM", case.device)
    guidance, halves = (eager.GUIDANCE, 2) if guided else (1.0, 1)
    combined = eager.guided if guided else lambda m: m

    def by_kernel(x, m, seeds):
        return step(x, m, seeds=seeds, guidance=guidance)

    def exact(x, m, seeds, draw=None):
        noise = {"noise": draw(x)} if draw else {"seeds": seeds}
        return step(x, m, **noise, guidance=guidance)

    theirs = {} if guided else from_diffusers(case, "DDPMScheduler", variance_type="fixed_large")
    return Work(
        op="sampler_step",
        variant=f"DDPM{' + guidance' if guided else ''}, noise made",
        case=case,
        inputs=lambda: (
            case.draw(),
            case.draw((halves * case.shape[0], *case.shape[1:])),
            case.seeds(),
        ),
        implementations=baselines(lambda x, m, _: eager.ddpm(x, combined(m)), case, noise="own")
        | {BY_X0: formula(lambda x, m, _: eager.ddpm_by_x0(x, combined(m)))}
        | theirs
        | ours(by_kernel),
        exact=exact,
        passes=2 + halves,
        eager_passes=28 if guided else 20,
        random=True,
    )


def sampler_steps(case: Case) -> list[Work]:
    return [
        ddim(case, "DDIM", eager.ddim, 12),
        ddim(case, "DDIM + clip", eager.ddim_clipped, 16, clip_sample=True),
        ddpm_given(case),
        ddpm_made(case, guided=False),
        ddpm_made(case, guided=True),
    ]


# --- perturb, philox_normal -----------------------------------------------------------------------


def perturbs(case: Case) -> list[Work]:
    t = 1 + case.seeds() % SCHEDULE.timesteps
    device = torch.device(case.device)
    tables = {
        dtype: [SCHEDULE.tensor(name, device, dtype) for name in ("signal", "sigma")]
        for dtype in DTYPES.values()
    }
    common = {"op": "perturb", "case": case, "passes": 3}

    def given(x0, z):
        return dx.perturb(x0, t, SCHEDULE, noise=z)[0]

    def given_eagerly(x0, z):
        signal, sigma = tables[x0.dtype]
        return eager.perturb(x0, signal[t], sigma[t], z)[0]

    def made(x0, seeds, draw=None):
        noise = {"noise": draw(x0)} if draw else {"seeds": seeds}
        return dx.perturb(x0, t, SCHEDULE, **noise)

    def made_eagerly(x0, seeds):
        signal, sigma = tables[x0.dtype]
        return eager.perturb(x0, signal[t], sigma[t])

    return [
        Work(
            variant="noise given",
            inputs=lambda: (case.draw(), case.draw()),
            implementations=baselines(given_eagerly, case) | ours(given),
            exact=given,
            eager_passes=7,
            **common,
        ),
        Work(
            variant="noise made",
            inputs=lambda: (case.draw(), case.seeds()),
            implementations=baselines(made_eagerly, case, noise="own") | ours(made),
            exact=made,
            eager_passes=8,
            random=True,
            **common,
        ),
    ]


def normals(case: Case) -> Work:
    def made(like, seeds):
        return dx.philox_normal(seeds, case.shape, dtype=like.dtype)

    def eagerly(like, seeds):
        return torch.randn_like(like)

    return Work(
        op="philox_normal",
        variant="noise made",
        case=case,
        inputs=lambda: (case.draw(), case.seeds()),
        implementations=baselines(eagerly, case, noise="own") | ours(made),
        exact=lambda like, seeds, draw=None: draw(like) if draw else made(like, seeds),
        passes=1,
        eager_passes=1,
        random=True,
    )
