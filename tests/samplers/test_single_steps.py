"""ddpm_step, ddim_step and perturb: the timestep in every form that torch's users have it in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)
T, PREVIOUS = 50, 25

SCALARS = {
    "int64": torch.tensor,
    "int32": lambda t: torch.tensor(t, dtype=torch.int32),
    "uint8": lambda t: torch.tensor(t, dtype=torch.uint8),
    "numpy int64": np.int64,
    "numpy uint16": np.uint16,
    "numpy array": np.array,
}
ROWS = {
    "int64 [B]": lambda t: torch.tensor([t, t]),
    "int16 [B]": lambda t: torch.tensor([t, t], dtype=torch.int16),
    "numpy [B]": lambda t: np.array([t, t]),
}
same = pytest.mark.parametrize("form", [*SCALARS, *ROWS])


def images():
    return torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)


@same
def test_timesteps_of_every_form(form):
    make = (SCALARS | ROWS)[form]
    x, m = images()
    for wanted, actual in (
        (dx.ddpm_step(x, m, T, SCHEDULE, seeds=1), dx.ddpm_step(x, m, make(T), SCHEDULE, seeds=1)),
        (
            dx.ddim_step(x, m, T, PREVIOUS, SCHEDULE, 0.5, seeds=1),
            dx.ddim_step(x, m, make(T), make(PREVIOUS), SCHEDULE, 0.5, seeds=1),
        ),
        (
            dx.perturb(x, torch.tensor([T, T]), SCHEDULE, seeds=1)[0],
            dx.perturb(x, make(T), SCHEDULE, seeds=1)[0],
        ),
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_each_sample_steps_from_its_own_timestep_to_its_own(eta):
    x, m = images()
    t, previous = (90, 3), (40, 0)
    actual = dx.ddim_step(x, m, torch.tensor(t), torch.tensor(previous), SCHEDULE, eta, noise=m)
    for b in range(2):
        one = slice(b, b + 1)
        wanted = dx.ddim_step(x[one], m[one], t[b], previous[b], SCHEDULE, eta, noise=m[one])
        assert torch.equal(actual[one], wanted)
    mixed = dx.ddim_step(x, m, torch.tensor(t), 0, SCHEDULE)
    assert torch.equal(mixed[1:], dx.ddim_step(x[1:], m[1:], 3, 0, SCHEDULE))


class NoReads(TorchDispatchMode):
    """Raises where a tensor's value is read by the host, which would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_devices_own_timesteps_are_not_waited_for(shape):
    """On "meta", where there is no value to read."""
    x, m = (a.to("meta") for a in images())
    t, previous = (torch.full(shape, n, device="meta") for n in (T, PREVIOUS))
    with NoReads():
        for y in (
            dx.ddpm_step(x, m, t, SCHEDULE, seeds=1),
            dx.ddim_step(x, m, t, previous, SCHEDULE, 0.5, seeds=1),
            dx.ddim_step(x, m, t, 0, SCHEDULE),
            dx.perturb(x, t, SCHEDULE, seeds=1)[0],
        ):
            assert y.shape == x.shape
            assert y.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_made_without_reading_are_those_of_the_host(dtype):
    """vmap hides the timesteps, as a device does."""
    x, m = (a.to(dtype) for a in images())
    t, previous = torch.tensor([90, 3]), torch.tensor([40, 0])

    def step(x, m, t, previous):
        x, m = x[None], m[None]
        return dx.ddim_step(x, m, t, previous, SCHEDULE, 0.7, noise=m)[0]

    actual = torch.func.vmap(step)(x, m, t, previous)
    wanted = dx.ddim_step(x, m, t, previous, SCHEDULE, 0.7, noise=m)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    with pytest.raises((IndexError, RuntimeError)):  # never a wrong result
        torch.func.vmap(step)(x, m, previous + 1, t)
