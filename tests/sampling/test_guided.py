"""Tables with guidance scales of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.dpmpp_2m(SCHEDULE, 8, clip=1.0)
SHAPE = (2, 3, 4, 4)
INTERVAL = (0.2, 0.9)


def model(x, t, c):
    shift = 0 if c is None else c.sum(1).to(x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(0.7 * x + t.to(x.dtype).reshape(-1, 1, 1, 1) + shift)


def sampled(table, **options):
    torch.manual_seed(1)
    options = {"context": torch.randn(2, 4), "progress": False, "seeds": 3} | options
    return dx.sample(options.pop("model", model), SHAPE, table, **options).images


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("make", [dx.ddim, dx.heun, dx.unipc, dx.dpmpp_sde])
def test_one_scale_for_all_rows_is_guidance_scale(make, backend):
    table = make(SCHEDULE, 6)
    with dx.use_backend(backend):
        assert torch.equal(sampled(dx.guided(table, 2.5)), sampled(table, guidance_scale=2.5))


def test_an_interval_keeps_the_scale_within_it():
    table = dx.guided(TABLE, 3.0, INTERVAL)
    r = TABLE.levels[:-1, 1] / TABLE.levels[:-1, 0]
    inside = (r > INTERVAL[0]) & (r <= INTERVAL[1])
    assert 0 < inside.sum() < len(TABLE)
    assert np.array_equal(table.guidance, np.where(inside, 3.0, 1.0))
    assert np.array_equal(table.weights[:, :-1], TABLE.weights)


@pytest.mark.parametrize(
    "options", [{}, {"differentiable": True}, {"null_context": torch.ones(2, 4)}]
)
def test_rows_of_scale_1_call_the_conditional_half_alone(options):
    table, batches = dx.guided(TABLE, 3.0, INTERVAL), []

    def counted(x, t, c):
        assert len(x) == len(t) == len(c)
        batches.append(len(x))
        return model(x, t, c)

    ours = sampled(table, model=counted, **options)
    assert batches == [2 if scale == 1 else 4 for scale in table.guidance]
    # The same rows, each of a run of its own with one scale for all.
    torch.manual_seed(1)
    context, null = torch.randn(2, 4), options.get("null_context", torch.zeros(2, 4))
    x = dx.philox_normal(torch.tensor([3, 4]), SHAPE)
    tensors, history = TABLE.tensors("cpu"), torch.zeros(SHAPE)
    for i, scale in enumerate(table.guidance.tolist()):
        t = torch.full((2,), TABLE.times[i], dtype=torch.float32)
        m = model(x, t, context)
        m = m if scale == 1 else torch.cat([model(x, t, null), m])
        x, history = dx.sampler_step(
            x,
            m,
            *tensors,
            torch.tensor(i),
            history=history,
            clip=1.0,
            guidance=scale,
            return_x0=True,
        )
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


def test_a_scale_for_each_row():
    scales = np.linspace(1, 4, len(TABLE))
    assert np.array_equal(dx.guided(TABLE, scales).guidance, scales)
    assert np.array_equal(dx.guided(dx.guided(TABLE, 2.0), scales).guidance, scales)
    assert dx.guided(TABLE, 2.0).shape.guided
    assert TABLE.guidance is None


def test_a_later_start_keeps_the_scales():
    table = dx.guided(TABLE, np.arange(1.0, 9.0))
    assert np.array_equal(table.starting_at(3).guidance, table.guidance)
    plms = dx.guided(dx.plms(SCHEDULE, 8), np.arange(1.0, 10.0))
    later = plms.starting_at(3)
    assert len(later) == len(plms) + 1
    assert later.guidance[-3:].tolist() == [7.0, 8.0, 9.0]


BAD = [
    (lambda: dx.guided(3, 2.0), TypeError, "table: wanted a StepTable"),
    (
        lambda: dx.guided(TABLE, [1.0, 2.0]),
        ValueError,
        "scale: wanted a number, or one for each of the table's 8 rows",
    ),
    (
        lambda: dx.guided(TABLE, "2"),
        TypeError,
        "scale: wanted a number, or one for each of the table's 8 rows",
    ),
    (lambda: dx.guided(TABLE, np.nan), ValueError, "scale: wanted finite numbers"),
    (lambda: dx.guided(TABLE, 2.0, 1.0), TypeError, "interval: wanted .low, high."),
    (lambda: dx.guided(TABLE, 2.0, (2.0, 1.0)), ValueError, "interval: wanted low <= high"),
    (lambda: sampled(dx.guided(TABLE, 2.0), guidance_scale=3.0), ValueError, "guidance_scale: wan"),
    (lambda: sampled(dx.guided(TABLE, 2.0), context=None), ValueError, "wants a context"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
