"""sampler_step(x, output, table, row): a loop of somebody's own by any sampler's table."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.samplers import SAMPLERS

SCHEDULE = dx.NoiseSchedule.linear(100)
SHAPE = (2, 3, 8, 8)
SEEDS = torch.tensor([5, 6])
X, OUTPUT = torch.randn(SHAPE), torch.randn(SHAPE)
TABLE, MULTISTEP = dx.ddim(SCHEDULE, 4), dx.dpmpp_2m(SCHEDULE, 4)
NOISY = dx.ddpm(SCHEDULE)
GUIDED = dx.guided(TABLE, 2.0)


def model(x, t, c=None):
    return 0.4 * x + t.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("name", [*SAMPLERS, "ddpm", "flow_heun", "ddim_inversion"])
def test_an_own_loop_draws_what_sample_draws(name):
    make = getattr(dx, name)
    takes = inspect.signature(make).parameters
    arguments = {"schedule": SCHEDULE, "steps": 4, "clip": 0.8}
    table = make(**{name: value for name, value in arguments.items() if name in takes})
    x = dx.philox_normal(SEEDS, SHAPE)
    slots = table.new_slots(x)
    for i, t in enumerate(table.times):
        output = model(x, x.new_full((2,), t))
        x = dx.sampler_step(x, output, table, i, seeds=SEEDS, slots=slots)
    expected = dx.sample(model, SHAPE, table, seeds=SEEDS, progress=False).images
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("table", [TABLE, MULTISTEP, dx.unipc(SCHEDULE, 4, clip=0.5)])
def test_a_table_and_its_tensors_give_one_step(table, dtype):
    x, output = X.to(dtype), torch.cat([OUTPUT, -OUTPUT]).to(dtype)
    ours, theirs = table.new_slots(x), table.new_slots(x)
    for i in range(4):
        actual = dx.sampler_step(
            x, output, table, i, guidance=1.5, return_x0=True, slots=ours, seeds=SEEDS
        )
        tensors = (*table.tensors("cpu", dtype), torch.tensor(i))
        options = {"clip": table.clip, "guidance": 1.5, "return_x0": True, "slots": theirs}
        expected = dx.sampler_step(x, output, *tensors, **options)
        assert all(map(torch.equal, actual, expected))
    assert ours is None or torch.equal(ours, theirs)


def test_a_row_in_every_form():
    wanted = dx.sampler_step(X, OUTPUT, TABLE, 2)
    for row in (np.int64(2), torch.tensor(2), torch.tensor([2, 2])):
        assert torch.equal(dx.sampler_step(X, OUTPUT, TABLE, row), wanted)
    assert torch.equal(dx.sampler_step(X, OUTPUT, TABLE, row=2), wanted)
    first = dx.sampler_step(X, OUTPUT, TABLE, torch.tensor([0, 2]))
    assert torch.equal(first[1], wanted[1])


def test_noise_in_every_form():
    wanted = dx.sampler_step(X, OUTPUT, NOISY, 3, noise=OUTPUT)
    tensors = (*NOISY.tensors(), torch.tensor(3))
    assert torch.equal(wanted, dx.sampler_step(X, OUTPUT, *tensors, noise=OUTPUT))
    drawn = torch.randn(SHAPE, generator=torch.manual_seed(3))
    by_hand = dx.sampler_step(X, OUTPUT, NOISY, 3, noise=drawn)
    by_generator = dx.sampler_step(X, OUTPUT, NOISY, 3, noise=torch.manual_seed(3))
    assert torch.equal(by_hand, by_generator)
    seeded = dx.sampler_step(X, OUTPUT, NOISY, 3, seeds=5)
    assert torch.equal(seeded, dx.sampler_step(X, OUTPUT, NOISY, 3, seeds=SEEDS))
    torch.manual_seed(1)
    neither = dx.sampler_step(X, OUTPUT, NOISY, torch.tensor(3))
    torch.manual_seed(1)
    assert torch.equal(neither, dx.sampler_step(X, OUTPUT, NOISY, 3))
    assert not torch.equal(neither, seeded)


def test_a_row_without_noise_draws_none():
    before = torch.get_rng_state()
    dx.sampler_step(X, OUTPUT, NOISY, len(NOISY) - 1)
    dx.sampler_step(X, OUTPUT, TABLE, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients():
    x = X.clone().requires_grad_()
    dx.sampler_step(x, OUTPUT, TABLE, 1).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(X, TABLE.weights[1, 2]))


@pytest.mark.compiles
def test_compiled():
    def step(x, output, table, row):
        return dx.sampler_step(x, output, table, row, seeds=SEEDS)

    torch._dynamo.reset()
    f = torch.compile(step, fullgraph=True, backend="aot_eager")
    for table in (dx.ddim(SCHEDULE, 3, eta=1.0), dx.ddim(SCHEDULE, 3, eta=0.5)):
        for row in (0, 2, torch.tensor(0), torch.tensor(1)):
            torch.testing.assert_close(f(X, OUTPUT, table, row), step(X, OUTPUT, table, row))


def step(x=X, output=OUTPUT, table=TABLE, row=0, **options):
    return lambda: dx.sampler_step(x, output, table, row, **options)


BAD = [
    (step(table=SCHEDULE), TypeError, "table: wanted a StepTable, such as .* got NoiseSchedule"),
    (step(table=dx.ddim), TypeError, "table: wanted a StepTable, .* got function"),
    (step(row=4), ValueError, "row: wanted from 0 to 3, got 4"),
    (step(row=-1), ValueError, "row: wanted from 0 to 3, got -1"),
    (step(row=1.0), TypeError, "row: wanted an int, or an int64 tensor, got float"),
    (step(row=None), TypeError, "row: wanted an int, or an int64 tensor, got NoneType"),
    (step(row=torch.tensor(4)), ValueError, "row: wanted values from 0 to 3, got 4 to 4"),
    (step(row=torch.tensor([0])), ValueError, r"row: wanted shape \[\] or \[2\], got \[1\]"),
    (step(x=3), TypeError, "x: wanted a tensor, got int"),
    (step(output=OUTPUT[:1]), ValueError, "model_output: wanted x's shape"),
    (step(table=MULTISTEP), ValueError, r"slots: wanted table.new_slots\(x\), .* got None"),
    (step(slots=X[None]), ValueError, "slots: wanted None with a table that has none, got a ten"),
    (
        step(table=MULTISTEP, slots=torch.zeros(2, *SHAPE)),
        ValueError,
        r"slots: wanted table.new_slots\(x\), .* got a tensor of torch.float32 \[2, 2, 3, 8, 8\]",
    ),
    (step(table=MULTISTEP, slots=X[None, :1]), ValueError, r"slots: wanted shape \[S, 2, 3, 8, 8"),
    (step(table=MULTISTEP, slots=X[None].double()), TypeError, "slots: wanted x's dtype"),
    (step(clip=1.0), ValueError, "history, clip: wanted None with a StepTable"),
    (step(history=X), ValueError, "history, clip: wanted None with a StepTable"),
    (
        lambda: dx.sampler_step(X, OUTPUT, TABLE, TABLE.tensors()[1], torch.tensor(0)),
        ValueError,
        "timesteps, row: wanted the row alone with a StepTable, got both",
    ),
    (step(table=GUIDED, guidance=2.0), ValueError, "guidance: wanted 1 with a table that has its"),
    (step(guidance="2"), TypeError, "guidance: wanted a number, got str"),
    (step(return_x0=1), TypeError, "return_x0: wanted True or False"),
    (step(table=NOISY, noise=X, seeds=1), ValueError, "noise, seeds: wanted one of them"),
    (step(table=NOISY, noise=X[:1]), ValueError, "noise: wanted x's shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_tables_arrays_are_read_only_and_its_tensors_are_torchs():
    with pytest.raises(ValueError, match="read-only"):
        TABLE.times[0] = 1.0
    coefficients, timesteps = TABLE.tensors()
    assert coefficients.dtype == torch.float32
    assert coefficients.tolist() == TABLE.coefficients.tolist()
    assert timesteps.tolist() == TABLE.timesteps.tolist()
    assert torch.tensor(TABLE.times).tolist() == TABLE.times.tolist()  # without a warning


def table(**arrays):
    arrays = {"timesteps": np.array([2, 1]), "weights": np.zeros((2, 7))} | arrays
    return lambda: dx.StepTable(clip=None, train_timesteps=100, **arrays)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (table(timesteps=[2, 1]), TypeError, "timesteps: wanted an array of numpy, got list"),
        (table(weights=torch.zeros(2, 7)), TypeError, "weights: wanted an array .* got Tensor"),
        (table(weights=np.zeros((3, 7))), ValueError, r"weights: wanted shape \[2, columns\], got"),
        (table(weights=np.zeros((2, 3))), ValueError, "weights: wanted 7 columns for 0 slots.* 3$"),
        (table(times=np.zeros(3)), ValueError, r"times: wanted shape \[2\], got \[3\]"),
        (table(levels=np.zeros((2, 2))), ValueError, r"levels: wanted shape \[3, columns\]"),
    ],
)
def test_what_is_no_table(call, error, message):
    assert len(table()()) == 2
    with pytest.raises(error, match=message):
        call()
