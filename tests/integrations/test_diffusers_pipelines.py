"""Our schedulers in diffusers' pipelines, and what a step asks of the host: nothing."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

theirs = pytest.importorskip("diffusers")
from diffusion_ext.integrations import diffusers as ours  # noqa: E402

SHAPE = (2, 3, 8, 8)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return theirs.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def run(pipe, scheduler, **arguments):
    pipe = copy.copy(pipe)
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(2)
    images = [
        pipe(batch_size=2, generator=generator, output_type="np", **arguments)[0] for _ in range(2)
    ]
    return torch.from_numpy(
        np.concatenate(images)
    )  # the second run goes on with the generator of the first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_ddpm_pipeline(unet, mode):
    pipe = theirs.DDPMPipeline(unet, theirs.DDPMScheduler())
    with mode():
        want = run(pipe, pipe.scheduler, num_inference_steps=12)
        got = run(
            pipe, ours.DDPMScheduler.from_config(pipe.scheduler.config), num_inference_steps=12
        )
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clipped", [None, True])
def test_ddim_pipeline(unet, eta, clipped):
    pipe = theirs.DDIMPipeline(unet, ours.DDIMScheduler())
    assert type(pipe.scheduler) is theirs.DDIMScheduler  # it makes its own: assign ours after
    arguments = {"num_inference_steps": 12, "eta": eta, "use_clipped_model_output": clipped}
    want = run(pipe, pipe.scheduler, **arguments)
    got = run(pipe, ours.DDIMScheduler.from_config(pipe.scheduler.config), **arguments)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_a_pipeline_is_saved_and_loaded(unet, tmp_path):
    pipe = theirs.DDPMPipeline(unet, ours.DDPMScheduler(noise="counter", beta_end=0.03))
    pipe.save_pretrained(tmp_path)
    loaded = theirs.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is ours.DDPMScheduler
    assert loaded.scheduler.noise == "counter"
    assert loaded.scheduler.config.beta_end == 0.03
    plain = theirs.DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert plain.config.beta_end == 0.03


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value becomes a number or a bool of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in func.name(), func
        assert "nonzero" not in func.name(), func
        assert "is_nonzero" not in func.name(), func
        return func(*args, **(kwargs or {}))


def schedulers():
    for variance_type in ("fixed_small", "fixed_large", "learned", "learned_range"):
        for extra in ({}, {"noise": "counter"}, {"thresholding": True}):
            yield ours.DDPMScheduler(variance_type=variance_type, **extra), {}
    for extra in ({}, {"noise": "counter"}, {"thresholding": True}, {"clip_sample": False}):
        yield ours.DDIMScheduler(**extra), {"eta": 0.5}
        yield ours.DDIMScheduler(**extra, exact_previous_timestep=True), {}


def test_a_step_reads_no_tensor():
    for scheduler, options in schedulers():
        scheduler.set_timesteps(5)
        learned = scheduler.config.get("variance_type", "").startswith("learned")
        x, m = torch.randn(SHAPE), torch.rand(2, 6 if learned else 3, 8, 8)
        scheduler.step(m, scheduler.timesteps[0], x, **options)  # the tables go to the device
        with NoReads():
            for t in scheduler.timesteps:
                scheduler.step(m, t, x, **options)
    with pytest.raises(AssertionError), NoReads():  # diffusers does
        theirs.DDPMScheduler().step(x, torch.tensor(3), x)


def test_a_step_on_a_device_that_cannot_be_read():
    """Tensors without values: whatever asked the host for one would raise."""
    for scheduler, options in schedulers():
        scheduler.set_timesteps(5, device="meta")
        learned = scheduler.config.get("variance_type", "").startswith("learned")
        x = torch.empty(SHAPE, device="meta")
        m = torch.empty(2, 6 if learned else 3, 8, 8, device="meta")
        for t in (*scheduler.timesteps, scheduler.timesteps[1].clone()):
            out = scheduler.step(m, t, x, **options)
            assert out.prev_sample.shape == out.pred_original_sample.shape == x.shape
        generator = torch.Generator()
        before = generator.get_state()
        if scheduler.noise == "generator" and not options:  # the host knows that t is 0
            scheduler.step(m, scheduler.timesteps[-1], x, generator=generator)
            assert torch.equal(generator.get_state(), before)


def test_diffusers_is_imported_only_for_its_schedulers():
    code = "import sys, diffusion_ext; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "try: import diffusion_ext.integrations.diffusers\n"
        "except ImportError as error: assert 'diffusion_ext[diffusers]' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_flow_through_a_step():
    scheduler = ours.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    x, m = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    with torch.inference_mode():
        scheduler.step(m, 400, x)  # the tables made here serve outside too
    want = theirs.DDIMScheduler(clip_sample=False)
    want.set_timesteps(5)
    grads = [
        torch.autograd.grad(s.step(m, 400, x).prev_sample.square().sum(), m)[0]
        for s in (scheduler, want)
    ]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@pytest.mark.compiles
@pytest.mark.parametrize("extra", [{}, {"noise": "counter"}])
def test_a_step_compiles_whole(extra):
    scheduler = ours.DDIMScheduler(**extra)
    x, m = torch.randn(2, *SHAPE)

    def step(m, t, x):
        return scheduler.step(m, t, x, eta=0.5, return_dict=False)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for steps in (10, 7):
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps[1:3]:
            results = []
            for each in (step, compiled):
                torch.manual_seed(1)
                results.append(each(m, t, x))
            torch.testing.assert_close(*results)
