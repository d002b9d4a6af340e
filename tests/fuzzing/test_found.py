"""What the fuzz has found, one by one: an error that names the argument, or the right result."""

import numpy as np
import pytest
import torch

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(20)
MODEL = dx.nn.ContextUnet(1, 8, 2, 4, norm="group").eval()
TABLE = dx.ddim(SCHEDULE, 2)
TWO = torch.tensor([1.0, 2.0])


def sampled(**options):
    options = {"model": MODEL, "shape": (1, 1, 4, 4), "table": TABLE, "progress": False, **options}
    return dx.sample(**options)


FOUND = [
    (lambda: dx.NoiseSchedule.linear(20, beta_start=TWO), TypeError, "beta_start: wanted a number"),
    (lambda: dx.NoiseSchedule.course(20, 1e-4, TWO), TypeError, "beta_end: wanted a number"),
    (lambda: dx.NoiseSchedule.linear(2**31), ValueError, "timesteps: wanted at most 16777216"),
    (lambda: dx.NoiseSchedule.linear(2**63), ValueError, "timesteps: wanted an int of 64 bits"),
    (lambda: dx.NoiseSchedule.cosine(9, offset=-1), ValueError, "offset: wanted a number of at"),
    (
        lambda: dx.NoiseSchedule.cosine(1, offset=2.0**53),
        ValueError,
        "offset: wanted one that gives",
    ),
    (lambda: dx.NoiseSchedule.cosine(9, beta_max=2), ValueError, r"beta_max: wanted a number in"),
    (
        lambda: dx.NoiseSchedule.from_betas(torch.zeros(2, dtype=torch.complex64)),
        TypeError,
        "betas: wanted numbers",
    ),
    (
        lambda: dx.NoiseSchedule.from_betas(torch.empty(3, device="meta")),
        TypeError,
        "betas: wanted numbers",
    ),
    (lambda: dx.NoiseSchedule(np.zeros(3), np.ones(4)), ValueError, r"alpha_bar: wanted shape"),
    (lambda: dx.NoiseSchedule(np.zeros(3), 2 * np.ones(3)), ValueError, r"alpha_bar: .*\[0, 1\]"),
    (lambda: dx.NoiseSchedule(1, np.ones(3)), TypeError, "beta: wanted a float64 array, got int"),
    (lambda: dx.heun(SCHEDULE, s_tmax=TWO), TypeError, "s_tmax: wanted a number"),
    (lambda: dx.lms(SCHEDULE, order=TWO), ValueError, "order: wanted one of"),
    (lambda: dx.unipc(SCHEDULE, corrector=TWO), TypeError, "corrector: wanted True or False"),
    (lambda: dx.ddim(SCHEDULE, spacing=np.zeros((2, 0))), ValueError, "spacing: wanted one of"),
    (
        lambda: dx.ddim_inversion(SCHEDULE, prediction=np.zeros(2)),
        ValueError,
        "prediction: wanted one of",
    ),
    (lambda: dx.sa_solver(SCHEDULE, tau=1e300), ValueError, "tau: wanted at most 1000"),
    (lambda: dx.flow_euler(5, shift=1e-300), ValueError, "shift: wanted from 1e-06"),
    (lambda: dx.flow_heun(2**31), ValueError, "steps: wanted at most 16777216"),
    (lambda: dx.ddim(SCHEDULE, clip=2**64), ValueError, "clip: wanted a float, or an int of 64"),
    (
        lambda: dx.guided(TABLE, torch.empty(2, device="meta")),
        TypeError,
        "scale: wanted a number, or one for each of the table's 2 rows",
    ),
    (lambda: dx.philox_normal(0, b"bytes"), TypeError, "shape: wanted"),
    (lambda: dx.philox_normal(0, np.array(3)), TypeError, "shape: wanted"),
    (lambda: dx.philox_normal(0, (2**40, 2**40)), ValueError, "shape: .* that a memory may hold"),
    (lambda: dx.philox_normal(0, (2,), device="cpw"), ValueError, "device: wanted a torch device"),
    (lambda: dx.philox_normal(0, (2,), device=1.5), TypeError, "device: wanted a torch device"),
    (
        lambda: dx.sampler_step(TWO, TWO, *TABLE.tensors("cpu"), torch.tensor(0), return_x0="x"),
        TypeError,
        "return_x0: wanted True or False",
    ),
    (lambda: dx.nn.GroupNormAct(0, 8), ValueError, "num_groups: wanted at least 1, got 0"),
    (lambda: dx.nn.GroupNormAct(2, 2**63), ValueError, "num_channels: wanted an int of 64 bits"),
    (lambda: dx.nn.GroupNormAct(2, 8, act=TWO), ValueError, "act: wanted one of"),
    (lambda: dx.nn.GroupNormAct(2, 8, affine=TWO), TypeError, "affine: wanted True or False"),
    (lambda: dx.nn.ContextUnet(2**62), ValueError, "in_channels: wanted at most"),
    (lambda: dx.nn.ContextUnet(1, pool_window=TWO), TypeError, "pool_window: wanted an int"),
    (lambda: MODEL("x", TWO), TypeError, "x: wanted a floating point tensor .* got 'x'"),
    (lambda: MODEL(torch.zeros(1, 1, 4, 4), None), TypeError, "t: .* got None"),
    (lambda: MODEL(torch.tensor(1.0), TWO), ValueError, r"x: wanted shape .*got \[\]"),
    (lambda: sampled(model=3), TypeError, "model: wanted a module or another callable, got int"),
    (lambda: sampled(callback=True), TypeError, "callback: wanted a callable or None, got bool"),
    (lambda: sampled(progress=TWO), TypeError, "progress: wanted True or False"),
    (lambda: sampled(differentiable=TWO), TypeError, "differentiable: wanted True or False"),
    (lambda: sampled(engine=np.zeros(2)), ValueError, "engine: wanted one of"),
    (lambda: dx.nn.load_context_unet(""), FileNotFoundError, "path: no file"),
]


@pytest.mark.parametrize(("call", "error", "message"), FOUND, ids=[m for _, _, m in FOUND])
def test_found(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("per_sample", [True, False])
def test_a_step_of_no_sample(per_sample):
    x, none = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64)
    t, t_prev = (none, none) if per_sample else (torch.tensor(5), torch.tensor(3))
    assert dx.ddim_step(x, x, t, t_prev, SCHEDULE).shape == x.shape
