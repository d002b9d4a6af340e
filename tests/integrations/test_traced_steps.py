"""How a traced step is taken: without a wait for the device, by our kernel, in so many passes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

theirs = pytest.importorskip("diffusers")
from beside_diffusers import NAMES, attempt, extra  # noqa: E402

from diffusion_ext.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = ours.__all__
aten = torch.ops.aten
SHAPE = (2, 3, 6, 5)


WAITS = {
    *(getattr(torch.Tensor, name) for name in ("item", "tolist", "numpy", "cpu", "nonzero")),
    *(getattr(torch.Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__")),
    *(getattr(torch.Tensor, name) for name in ("__array__", "unique", "masked_select")),
    *(torch.nonzero, torch.equal, torch.allclose, torch.argwhere, torch.unique),
}


class OnDevice(torch.Tensor):
    """A tensor as on a GPU: whoever looks at its numbers waits."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in WAITS and any(isinstance(a, OnDevice) and a.numel() for a in args):
            raise AssertionError(f"{func.__name__} waits for the device")
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnDevice)


def started(library, name, steps=6, **config):
    scheduler = getattr(library, name)(**config, **extra(name))
    scheduler.set_timesteps(steps)
    scheduler.timesteps = on_device(scheduler.timesteps)
    if library is ours:
        with torch.DisableTorchFunctionSubclass():
            scheduler._current_run()  # as set_timesteps leaves it on a GPU
    return scheduler


def run(scheduler, **options):
    x = on_device(torch.randn(SHAPE))
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(on_device(torch.randn(SHAPE)), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("name", ALL)
def test_no_step_waits_for_the_device(name):
    result = run(started(ours, name))
    assert isinstance(result, OnDevice)
    assert torch.Tensor(result).isfinite().all()


@pytest.mark.parametrize("name", ["LCMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_wait_is_seen(name):
    with pytest.raises(AssertionError, match="waits for the device"):
        run(started(theirs, name))


class NoReads(TorchDispatchMode):
    """As sync debug mode on a GPU: no number may be read, of whichever tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", [n for n in ALL if n != "DPMSolverSDEScheduler"])  # torchsde reads
def test_no_step_reads_a_number(name):
    """From the first step of a run on."""
    for _ in range(2):
        scheduler = getattr(ours, name)(**extra(name))
        scheduler.set_timesteps(6)
        x = torch.randn(SHAPE)
        with NoReads():
            for t in scheduler.timesteps:
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, t)
                x = scheduler.step(x * 0.5, t, x).prev_sample
        assert x.isfinite().all()


def test_a_read_is_seen():
    scheduler = theirs.EulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    with NoReads(), pytest.raises(AssertionError, match="waits for the device"):
        scheduler.scale_model_input(torch.randn(SHAPE), scheduler.timesteps[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ALL)
def test_no_step_waits_for_a_gpu(name):
    scheduler = getattr(ours, name)(**extra(name))
    scheduler.set_timesteps(6, device="cuda")
    x = torch.randn(SHAPE, device="cuda")
    outputs = torch.randn(len(scheduler.timesteps), *SHAPE, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for m, t in zip(outputs, scheduler.timesteps, strict=True):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(m, t, x).prev_sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


class Calls(TorchDispatchMode):
    """The ops that are called on more than single numbers."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        outputs = result if isinstance(result, (list, tuple)) else [result]
        if any(isinstance(r, torch.Tensor) and r.numel() >= 180 for r in outputs):
            self.names.append(str(func))
        return result


STEP = "diffusion_ext.sampler_step_of_row.default"


def calls_of(scheduler, x, m, t, **options) -> list[str]:
    with Calls() as calls:
        scheduler.step(m, t, x, **options)
    return [name for name in calls.names if "detach" not in name]


@pytest.mark.parametrize("name", ALL)
def test_a_step_is_one_kernel(name):
    scheduler = getattr(ours, name)(**extra(name))
    for first in (True, False):
        scheduler.set_timesteps(6)
        for t in scheduler.timesteps:
            x, m = torch.randn(SHAPE), torch.randn(SHAPE)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            calls = calls_of(scheduler, x, m, t)
            if first and name in ("DDPMScheduler", "DDIMScheduler"):
                continue  # a table of a thousand rows is made
            noises = [c for c in calls if "randn" in c]
            if name != "DPMSolverSDEScheduler":  # a Brownian tree draws many
                assert len(noises) <= 1
                calls = [c for c in calls if c not in noises]
                assert calls == [STEP]
            assert calls.count(STEP) == 1


def test_a_new_scheduler_of_the_same_numbers_has_the_traces():
    cls = ours.DEISMultistepScheduler
    first, same, other = (cls(**c) for c in ({}, {}, {"beta_end": 0.015}))
    for scheduler in (first, same, other):
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            scheduler.step(torch.randn(SHAPE), t, torch.randn(SHAPE))
    assert first._run.traces is same._run.traces
    assert len(first._run.traces) == 4
    assert other._run.traces is not first._run.traces


@pytest.mark.parametrize("name", [n for n in NAMES if "SDE" not in n])  # torchsde's noise is there
def test_the_default_device_is_another(name):
    """As inside `with torch.device("cuda")`: what the host computes stays there."""
    scheduler = getattr(ours, name)(**extra(name))
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    generator = torch.Generator()
    draws = "generator" in inspect.signature(scheduler.step).parameters
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        with torch.device("meta"):
            x = scheduler.step(x, t, x, **{"generator": generator} if draws else {}).prev_sample
    assert x.isfinite().all()


LEFT = {  # what goes to diffusers' own step: (class, config, options of the step, arguments)
    "the output has to be broadcast": ("EulerDiscreteScheduler", {}, {}, {"m": (1, 3, 6, 5)}),
    "a learned variance beside it": (
        "DPMSolverMultistepScheduler", {"variance_type": "learned"}, {}, {"m": (2, 6, 6, 5)},
    ),
    "timesteps of each token": (
        "FlowMatchEulerDiscreteScheduler", {}, {"per_token_timesteps": torch.rand(2, 6)},
        {"x": (2, 6, 5), "m": (2, 6, 5)},
    ),
    "x0 from elsewhere": (
        "EDMEulerScheduler", {}, {"pred_original_sample": torch.randn(SHAPE)}, {},
    ),
    "another scheduler in it": (
        "UniPCMultistepScheduler",
        {"solver_p": theirs.DPMSolverMultistepScheduler(), "solver_order": 2}, {}, {},
    ),
    "a clip that is no range": (
        "HeunDiscreteScheduler", {"clip_sample": True, "clip_sample_range": 0.0}, {}, {},
    ),
    "a tensor as an option": ("TCDScheduler", {}, {"eta": torch.tensor(0.3)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_to_diffusers(why, monkeypatch):
    name, config, options, given = LEFT[why]
    if not {*options} <= {*inspect.signature(getattr(theirs, name).step).parameters}:
        pytest.skip("this diffusers has no such argument")
    made, own, theirs_step = [], [], getattr(theirs, name).step

    def counted(*args, **kwargs):
        own.append(1)
        return theirs_step(*args, **kwargs)

    for library in (theirs, ours):
        scheduler = getattr(library, name)(**config)
        scheduler.set_timesteps(4)
        torch.manual_seed(1)
        for t in scheduler.timesteps[:2]:
            x, m = (torch.randn(given.get(n, SHAPE)) for n in "xm")
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            made.append(scheduler.step(m, t, x, **options).prev_sample)
        monkeypatch.setattr(getattr(theirs, name), "step", counted)
    assert len(own) >= 2  # a step that turns out to be untraceable has been tried on diffusers' own
    torch.testing.assert_close(made[2:], made[:2], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s, x, t: s.step(x[:, :, :3], t, x), RuntimeError),
        (lambda s, x, t: s.step(x, t, x, 1, 2, 3, 4, 5, 6, 7, 8), TypeError),
        (lambda s, x, t: s.step(x, t, x, nonsense=1), TypeError),
        (lambda s, x, t: s.step(x, t, x, variance_noise=x), TypeError),
        (lambda s, x, t: s.step(x, 3, x), ValueError),
        (lambda s, x, t: s.step(x, torch.tensor(3), x), ValueError),
        (lambda s, x, t: s.step(None, t, x), Exception),
    ],
)
def test_errors_are_diffusers_own(change, error):
    messages = []
    for library in (theirs, ours):
        scheduler = library.EulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        x, t = torch.randn(SHAPE), scheduler.timesteps[0]
        scheduler.scale_model_input(x, t)
        with pytest.raises(error) as caught:
            change(scheduler, x, t)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]
    scheduler.step(x, t, x)  # and nothing is broken by it


@pytest.mark.parametrize("name", [n for n in NAMES if "FlowMatchHeun" not in n])  # which has no dt
def test_a_scheduler_without_set_timesteps(name):
    x, made = torch.randn(SHAPE), []
    for library in (theirs, ours):
        scheduler = getattr(library, name)(**extra(name))
        at = torch.tensor(5) if scheduler.timesteps is None else scheduler.timesteps[0]
        torch.manual_seed(1)
        made.append(attempt(lambda s=scheduler, at=at: s.step(x, at, x).prev_sample))
    (want, refused), (got, we_refused) = made
    assert type(refused) is type(we_refused)
    assert str(refused).replace("diffusers.schedulers", "") == str(we_refused) or refused is None
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_a_generator_for_a_step_that_draws_nothing():
    for library in (theirs, ours):
        scheduler = library.HeunDiscreteScheduler()
        scheduler.set_timesteps(4)
        x, t = torch.randn(SHAPE), scheduler.timesteps[0]
        for _ in range(2):
            with pytest.raises(TypeError, match="unexpected keyword argument 'generator'"):
                scheduler.step(x, t, x, generator=torch.Generator())


def test_numbers_that_do_not_fit_the_sample():
    """With this configuration diffusers multiplies the sample by a whole table."""
    config = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True}
    for library in (theirs, ours):
        scheduler = library.DPMSolverSinglestepScheduler(**config)
        scheduler.set_timesteps(4)
        x = torch.randn(SHAPE)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="must match the size"):
                scheduler.step(x, scheduler.timesteps[0], x)


def test_an_unknown_prediction():
    scheduler = ours.HeunDiscreteScheduler(prediction_type="mystery")
    scheduler.set_timesteps(4)
    x = torch.randn(SHAPE)
    for _ in range(2):
        with pytest.raises(ValueError, match="prediction_type given as mystery"):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_inference_mode_and_back(name):
    scheduler = getattr(ours, name)()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            scheduler.set_timesteps(3)
            x = torch.randn(SHAPE)
            for t in scheduler.timesteps:
                m = scheduler.scale_model_input(x.clone(), t) * 0.5
                x = scheduler.step(m, t, x).prev_sample
    scheduler.set_timesteps(3)
    x = torch.randn(SHAPE, requires_grad=True)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x).prev_sample.sum().backward()
    assert x.grad.isfinite().all()


def test_without_scipy_and_torchsde():
    """The schedulers that need them say so when they are made, as diffusers' do."""
    program = """
import sys
sys.modules["scipy"] = sys.modules["torchsde"] = None
from diffusion_ext.integrations import diffusers as ours
ours.EulerDiscreteScheduler()
for name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):
    try:
        getattr(ours, name)()
    except ImportError as error:
        print(name, "pip install" in str(error))
"""
    run = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [
        "LMSDiscreteScheduler True",
        "DPMSolverSDEScheduler True",
    ], done.stderr
