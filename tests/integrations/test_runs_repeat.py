"""The same seed twice gives the same bits: no scheduler takes anything from its runs before."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

pytest.importorskip("diffusers")
from beside_diffusers import draws, extra, scaled

from diffusion_ext.integrations import diffusers as ours

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE, STEPS = (2, 4, 9, 9), 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_PICKLES = ("SASolverScheduler", "DPMSolverSDEScheduler")  # nor are diffusers' own

every = pytest.mark.parametrize("name", ours.__all__)


def new(name: str):
    return getattr(ours, name)(**extra(name))


def run(
    scheduler, dtype, guided: bool, steps=STEPS, shape=SHAPE, stop=None, change=None, begin=None
):
    """As pipelines do: every sample, of a model that stands in for a network."""
    scheduler.set_timesteps(steps)
    if begin is not None:
        begin(scheduler)
    generator = torch.Generator().manual_seed(3)
    x, samples = torch.randn(shape, generator=generator).to(dtype), []
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        if i == stop:
            break
        if change is not None and i == 3:
            scheduler = change(scheduler)
        m = torch.tanh(scaled(scheduler, torch.cat([x, x]) if guided else x, t) + t / 1000)
        if guided:
            without, within = m.chunk(2)
            m = without + 3 * (0.9 * within - without)
        options = {"generator": generator} if draws(scheduler) else {}
        x = scheduler.step(m.to(dtype), t, x, **options).prev_sample
        samples.append(x)
    return samples


def assert_same(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype
        assert a.isfinite().all(), i
        assert torch.equal(a, b), i


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guided", [False, True])
def test_a_second_run_has_the_bits_of_the_first(name, dtype, guided):
    scheduler = new(name)
    first = run(scheduler, dtype, guided)
    for _ in range(2):
        assert_same(run(scheduler, dtype, guided), first)
    assert_same(run(new(name), dtype, guided), first)


RUNS_BEFORE = {
    "guided": partial(run, guided=True),
    "unguided": partial(run, guided=False),
    "other steps": partial(run, guided=False, steps=5),
    "another shape": partial(run, guided=False, shape=(1, 4, 6, 6)),
    "stopped": partial(run, guided=False, stop=3),
    "another shape, stopped": partial(run, guided=False, shape=(1, 4, 6, 6), stop=3),
}


@every
@pytest.mark.parametrize("before", RUNS_BEFORE.values(), ids=list(RUNS_BEFORE))
def test_runs_before_do_not_matter(name, before):
    used = new(name)
    for dtype, earlier in zip(DTYPES, (*DTYPES[1:], DTYPES[0]), strict=True):
        want = run(new(name), dtype, False)
        for of_before in (dtype, earlier):
            before(used, of_before)
            assert_same(run(used, dtype, False), want)


@every
def test_copies_in_the_middle_have_the_same_bits(name):
    """A copy has no traces: they are made anew in the middle of its run."""
    changes = [copy.copy]
    if name not in NO_PICKLES:
        changes += [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))]
    for dtype in DTYPES[:2]:
        want, used = run(new(name), dtype, False), new(name)
        run(used, dtype, False)
        for change in changes:
            assert_same(run(used, dtype, False, change=change), want)


@every
def test_rows_that_were_traced_before_have_the_same_bits(name, monkeypatch):
    """A scheduler whose rows lie ready, beside one that is the first of its kind."""
    ready = new(name)
    run(ready, torch.float32, False)
    made = getattr(ours, name)
    if hasattr(made, "_latest"):
        monkeypatch.setattr(made, "_latest", None)
    first = run(new(name), torch.float32, False)
    assert_same(run(ready, torch.float32, False), first)


@every
@pytest.mark.parametrize("attribute", ["sigmas", "alphas_cumprod"])
@pytest.mark.parametrize(
    "write", [lambda t: t.mul_(0.9), lambda t: t * 0.9], ids=["in place", "new"]
)
def test_levels_that_are_written_after_a_run_are_used(name, attribute, write):
    """What is kept of a run is never used once what it was made of has changed."""

    def begin(scheduler):
        setattr(scheduler, attribute, write(getattr(scheduler, attribute)))

    used = new(name)
    run(used, torch.float32, False)
    if not isinstance(getattr(used, attribute, None), torch.Tensor):
        pytest.skip(f"it has no {attribute}")
    want = run(new(name), torch.float32, False, begin=begin)
    assert_same(run(used, torch.float32, False, begin=begin), want)
