"""Our diffusers schedulers on a GPU: diffusers' own samples, and no wait in a step."""

import inspect

import pytest
import torch
from harness import waits_are_errors

diffusers = pytest.importorskip("diffusers")

from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU"),
    pytest.mark.filterwarnings("ignore"),  # diffusers' and torchsde's
]

SCHEDULERS = [name for name in ours.__all__ if name.endswith("Scheduler")]
SHAPE = (2, 3, 8, 8)
GENERATORS = {
    "none": lambda: None,
    "cpu": lambda: torch.Generator().manual_seed(5),
    "cuda": lambda: torch.Generator("cuda").manual_seed(5),
    "a list": lambda: [torch.Generator().manual_seed(seed) for seed in range(2)],
}


def begun(scheduler, device):
    if "device" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(6, device=device)
    else:
        scheduler.set_timesteps(6)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    return x * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else x


def run(scheduler, device="cuda", generator=None, waits=True):
    torch.manual_seed(0)
    x, options = begun(scheduler, device), {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = generator
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for i, t in enumerate(scheduler.timesteps):
        with waits_are_errors(not waits and i > 0):
            x = scheduler.step((scale(x, t) * 0.3).tanh(), t, x, **options).prev_sample
    return x


def assert_near(actual, wanted):
    most = wanted.abs().max().item()
    torch.testing.assert_close(actual.cpu(), wanted.cpu(), rtol=1e-4, atol=1e-4 * most)


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_diffusers_own_samples_without_a_wait(name, kind):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    theirs = run(getattr(diffusers, name)(), generator=GENERATORS[kind]())
    mine = run(getattr(ours, name)(), generator=GENERATORS[kind](), waits=False)
    assert_near(mine, theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_changes_its_device(name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    scheduler = getattr(ours, name)()
    expected = run(getattr(ours, name)(), "cpu", GENERATORS["cpu"]())
    for device in ("cuda", "cpu", "cuda"):
        assert_near(run(scheduler, device, GENERATORS["cpu"]()), expected)


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("seeds", [7, torch.arange(2), None], ids=str)
def test_counter_noise_waits_for_nothing(name, seeds):
    scheduler = getattr(ours, name)(noise="counter")
    scheduler.set_seeds(seeds)
    first = run(scheduler, waits=False)
    if seeds is not None:
        other = getattr(ours, name)(noise="counter")
        other.set_seeds(seeds)
        assert_near(first, run(other, "cpu"))
