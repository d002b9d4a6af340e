"""What holds of every sampler: predictions, clipping, any number of steps, kernels, gradients."""

from __future__ import annotations

import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from counterparts import SCHEDULE, denoised, draw, ratios, run

import diffusion_ext as dx
from diffusion_ext import samplers
from diffusion_ext.samplers import SAMPLERS, SPACINGS

TWO_CALLS = ("dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "heun")
every = pytest.mark.parametrize("name", SAMPLERS)


def test_none_is_forgotten():
    made = {
        name for name in samplers.__all__
        if inspect.isfunction(make := getattr(samplers, name))
        and {"schedule", "steps"} <= inspect.signature(make).parameters.keys()
    }  # fmt: skip
    assert made - {"ddim_inversion"} == set(SAMPLERS)
    assert set(SAMPLERS) | {"flow_euler", "flow_heun"} <= set(dx.__all__)


@every
def test_the_prediction_does_not_matter(name):
    """A model of x0, ε or v says the same, and so the samples are the same."""

    def says(prediction):
        def model(y, r):
            signal = 1 / math.sqrt(1 + r * r)
            x0, sigma = denoised(y, r), r * signal
            eps = (y - x0) / r
            return {"x0": x0, "epsilon": eps, "v": signal * eps - sigma * x0, "flow": eps - x0}[
                prediction
            ]

        return model

    for clip in (None, 0.7):
        y = draw(0) * 10
        runs = [
            run(SAMPLERS[name](SCHEDULE, 5, clip=clip, prediction=prediction), y, says(prediction))
            for prediction in ("x0", "epsilon", "v", "flow")
        ]
        for other in runs[1:]:
            for a, b in zip(runs[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@every
def test_clipping_is_a_model_that_is_clipped(name):
    table, clipped = (SAMPLERS[name](SCHEDULE, 5, clip=c, prediction="x0") for c in (None, 0.4))
    y = draw(0) * 10
    expected = run(table, y, lambda y, r: denoised(y, r).clamp(-0.4, 0.4))
    for a, b in zip(run(clipped, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert run(table, y)[-1].abs().max() > 0.5  # else there was nothing to clip


@every
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50])
def test_any_number_of_steps(name, steps):
    table = SAMPLERS[name](SCHEDULE, steps, prediction="x0")
    calls = 2 * steps - 1 if name in TWO_CALLS else steps + (name == "plms" and steps > 1)
    assert len(table) == calls
    assert len(set(table.timesteps.tolist())) == calls or name == "plms"
    final = run(table, draw(0) * ratios(table)[0].item())[-1]
    assert final.isfinite().all()
    assert final.abs().max() < 10
    assert table.levels[-1].tolist() == [1.0, 0.0]


@every
def test_every_spacing(name):
    make = SAMPLERS[name]
    if "spacing" not in inspect.signature(make).parameters:
        return
    for spacing in SPACINGS:
        table = make(SCHEDULE, 12, spacing=spacing, prediction="x0")
        assert np.isfinite(table.weights).all()
        assert (np.diff(ratios(table).numpy()[:: 2 if name in TWO_CALLS else 1]) <= 0).all()
        assert table.times.max() <= 1
        assert table.times.min() > 0


def conv_model(dtype=torch.float32):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 3, 3, padding=1).to(dtype)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, t, c=None):
            shift = t.to(x.dtype).reshape(-1, 1, 1, 1)
            shift = shift if c is None else shift + c.sum(1).reshape(-1, 1, 1, 1)
            return torch.tanh(self.conv(x) + shift)

    return Model()


def sampled(table, dtype=torch.float32, **options):
    shape = (2, 3, 8, 8)
    return dx.sample(conv_model(dtype), shape, table, seeds=3, progress=False, **options).images


@every
@pytest.mark.parametrize("clip", [None, 0.8])
def test_the_kernels_and_the_reference_agree(name, clip):
    """float32 by the kernels and by the reference, bfloat16, and all beside float64."""
    table = SAMPLERS[name](SCHEDULE, 6, clip=clip, prediction="v")
    context = torch.randn(2, 4).double()
    options = {"context": context, "guidance_scale": 1.5}
    exact = sampled(table, torch.float64, **options)
    scale = exact.abs().max().item()
    for backend in ("native", "reference"):
        with dx.use_backend(backend):
            single = sampled(table, **options)
            half = sampled(table, torch.bfloat16, **options)
        torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.1 * scale)


@every
def test_a_sample_is_its_seeds_alone(name):
    table = SAMPLERS[name](SCHEDULE, 4, prediction="v")

    def model(x, t, c):
        return torch.tanh(x + t.reshape(-1, 1, 1, 1))

    both = dx.sample(model, (2, 3, 8, 8), table, seeds=torch.tensor([5, 9]), progress=False).images
    alone = dx.sample(model, (1, 3, 8, 8), table, seeds=9, progress=False).images
    assert torch.equal(both[1:], alone)


@every
def test_gradients_flow_to_the_start(name):
    table = SAMPLERS[name](SCHEDULE, 3, prediction="v")
    x_T = draw(0)[:, :, :4, :4].clone().requires_grad_()
    model = conv_model(torch.float64)

    def images(x_T, **options):
        return dx.sample(
            model, x_T.shape, table, x_T=x_T, seeds=1, progress=False, **options
        ).images

    out = images(x_T, differentiable=True)
    torch.testing.assert_close(out, images(x_T.detach()), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x_T)
    direction = torch.randn_like(x_T)
    step = 1e-6 * direction
    with torch.no_grad():
        change = (images(x_T + step) - images(x_T - step)) / 2e-6
    torch.testing.assert_close(
        (gradient * direction).sum(), (change * weights).sum(), rtol=1e-6, atol=1e-7
    )


@every
def test_a_run_that_starts_later_remembers_nothing(name):
    """Image to image: rows from a step on are those of the same sampler on the rest of the grid."""
    make, start, first = SAMPLERS[name], draw(0).float(), 2
    table = make(SCHEDULE, 6, prediction="v")
    row = 2 * first if name in TWO_CALLS else first + (name == "plms")
    rest, seeds = table.starting_at(row), torch.arange(4, 6)
    assert np.array_equal(rest.levels[row:][[0, -1]], table.levels[row:][[0, -1]])
    model, options = conv_model(), {"seeds": seeds, "progress": False}
    ours = dx.sample(model, start.shape, table, start=start, first_step=row, **options).images
    signal, sigma = table.levels[row].tolist()
    x = signal * start + sigma * dx.philox_normal(seeds, start.shape)
    tensors, slots = rest.tensors("cpu"), rest.new_slots(x)
    if slots is not None:
        slots.fill_(torch.nan)  # what was not kept is not read
    for i in range(row, len(rest)):
        with torch.no_grad():
            m = model(x, torch.full((2,), rest.times[i], dtype=torch.float32))
        x = dx.sampler_step(x, m, *tensors, torch.tensor(i), seeds=seeds, slots=slots)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


OPTIONS = [{}, {"eta": 0.0}, {"eta": 1.0}, {"s_churn": 2.0}, {"spacing": "karras"}]
KEPT = {"flow_euler": dx.flow_euler(4), "flow_heun": dx.flow_heun(4)} | {
    f"{name} {options}": make(SCHEDULE, 4, **options)
    for name, make in SAMPLERS.items()
    for options in OPTIONS
    if options.keys() <= inspect.signature(make).parameters.keys()
}


@pytest.mark.parametrize("table", KEPT.values(), ids=list(KEPT))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_mask_keeps_comes_back_to_the_bit(table, dtype):
    image, mask = torch.randn(2, 3, 8, 8).to(dtype), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    for first in {0, int(table.begins.nonzero()[0][-1])}:
        images = sampled(table, dtype, start=image, mask=mask, first_step=first)
        assert torch.equal(images[..., :4], image[..., :4])
        assert not torch.isclose(images[..., 4:], image[..., 4:]).all()


def test_a_run_does_not_start_inside_a_step():
    with pytest.raises(
        ValueError, match="first_step: wanted a row that can begin a run, such as 2, got 3"
    ):
        sampled(dx.heun(SCHEDULE, 6), start=torch.zeros(2, 3, 8, 8), first_step=3)


@every
def test_a_table_can_be_pickled(name):
    table = SAMPLERS[name](SCHEDULE, 4)
    copy = pickle.loads(pickle.dumps(table))
    assert np.array_equal(copy.weights, table.weights)
    row = 2 if name in (*TWO_CALLS, "plms") else 1
    assert np.array_equal(copy.starting_at(row).weights, table.starting_at(row).weights)


def test_a_pickled_table_of_an_earlier_version():
    """It lacks what later versions make of a table."""
    table = dx.ddim(SCHEDULE, 4, eta=1.0)
    state = {n: v for n, v in table.__getstate__().items() if n not in ("noisy", "_digest")}
    old = object.__new__(dx.StepTable)
    old.__setstate__(state)
    x = torch.ones(1, 2, 3, 3)
    of_both = [dx.sampler_step(x, x, t, 0, seeds=3) for t in (old, table)]
    assert torch.equal(*of_both)


ZERO_SNR = SCHEDULE.zero_terminal_snr()


@every
def test_zero_terminal_snr_is_sampled_or_refused(name):
    """At T there is no signal: x/signal is infinite, of which some samplers need nothing."""
    spaced = "spacing" in inspect.signature(SAMPLERS[name]).parameters
    options = {"prediction": "v"} | ({"spacing": "trailing"} if spaced else {})
    if name in ("deis", "dpm2", "dpmpp_sde", "heun", "ipndm", "lms", "plms"):
        with pytest.raises(ValueError, match="this sampler has no step from t = "):
            SAMPLERS[name](ZERO_SNR, 6, **options)
        return
    table = SAMPLERS[name](ZERO_SNR, 6, **options)
    assert table.levels[0, 0] == 0
    assert sampled(table).isfinite().all()


BAD = [
    (lambda: dx.lms(SCHEDULE, order=5), ValueError, "order: wanted one of .1, 2, 3, 4., got 5"),
    (lambda: dx.deis(SCHEDULE, order=0), ValueError, "order: wanted one of"),
    (lambda: dx.unipc(SCHEDULE, order=True), ValueError, "order: wanted one of"),
    (lambda: dx.unipc(SCHEDULE, variant="bh3"), ValueError, "variant: wanted one of"),
    (lambda: dx.dpmpp_2m(SCHEDULE, solver="euler"), ValueError, "solver: wanted one of"),
    (lambda: dx.dpmpp_2m(SCHEDULE, order=4), ValueError, "order: wanted one of"),
    (lambda: dx.dpmpp_2m_sde(SCHEDULE, eta=-1.0), ValueError, "eta: wanted a number of at least 0"),
    (lambda: dx.euler_ancestral(SCHEDULE, eta=2.0), ValueError, "eta: wanted a number from 0 to 1"),
    (lambda: dx.euler(SCHEDULE, s_churn=-1), ValueError, "s_churn: wanted a number of at least 0"),
    (lambda: dx.heun(SCHEDULE, s_noise="1"), TypeError, "s_noise: wanted a number, got str"),
    (lambda: dx.heun(SCHEDULE, 0), ValueError, "steps: wanted from 1 to 1000"),
    (lambda: dx.heun(3), TypeError, "schedule: wanted a NoiseSchedule, got int"),
    (lambda: dx.dpmpp_sde(SCHEDULE, r=0.0), ValueError, "r: wanted a number above 0"),
    (lambda: dx.sa_solver(SCHEDULE, tau=-1), ValueError, "tau: wanted a number of at least 0"),
    (lambda: dx.sa_solver(SCHEDULE, corrector_order=5), ValueError, "corrector_order: wanted"),
    (lambda: dx.sa_solver(SCHEDULE, interval=3), TypeError, "interval: wanted .low, high."),
    (lambda: dx.lcm(SCHEDULE, 51), ValueError, "steps: wanted from 1 to 50 .original_steps."),
    (lambda: dx.tcd(SCHEDULE, 4.0), TypeError, "steps: wanted an int, got float"),
    (lambda: dx.tcd(SCHEDULE, original_steps=2000), ValueError, "original_steps: wanted from 1"),
    (lambda: dx.deis(SCHEDULE, spacing="even"), ValueError, "spacing: wanted one of"),
    (lambda: dx.flow_heun(0), ValueError, "steps: wanted at least 1"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call()
