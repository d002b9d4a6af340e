"""A diffusers pipeline with its own scheduler, with ours, and its network fused."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

import diffusion_ext as dx

from .networks import SAMPLING, built, tolerance
from .work import Case, Work


def unet_of(case: Case, channels: tuple[int, ...]):
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet2DModel(
            sample_size=case.shape[-1],
            in_channels=case.shape[1],
            out_channels=case.shape[1],
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            norm_num_groups=8,
        )
    return model.to(case.device)


# diffusers' default schedule multiplies a network's rounding by 157, which would hide an error.
SCHEDULE = {"beta_end": 0.005}


def pipelines(case: Case, channels: tuple[int, ...], steps: int = 10) -> list[Work]:
    """case: the pictures. None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    from diffusers import DDIMPipeline, DDIMScheduler

    from diffusion_ext.integrations.diffusers import DDIMScheduler as OurScheduler

    def draw():
        generator = torch.Generator(case.device).manual_seed(0)
        return torch.randn(case.shape, generator=generator, device=case.device)

    def run(scheduler, fused=False):
        pipe = DDIMPipeline(unet_of(case, channels), DDIMScheduler(**SCHEDULE))
        pipe.scheduler = scheduler(
            **SCHEDULE
        )  # the pipeline makes one of diffusers' own of what it is given
        pipe.set_progress_bar_config(disable=True)
        if fused:
            dx.fuse(pipe.unet.to(memory_format=torch.channels_last))

        def images(*_):
            generator = torch.Generator(case.device).manual_seed(0)
            options = {"num_inference_steps": steps, "output_type": "pt", "return_dict": False}
            return pipe(case.shape[0], generator, **options)[0]

        return images

    @torch.no_grad()
    def exact(*_):
        """The pipeline's loop in float64, from the noise that it draws in float32."""
        model, scheduler, x = (
            unet_of(case, channels).double(),
            DDIMScheduler(**SCHEDULE),
            draw().double(),
        )
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)

    of = {"factor": tolerance(SAMPLING, case.device)}
    work = Work(
        op="diffusers pipeline",
        variant=f"DDIM, {steps} steps",
        case=case,
        inputs=lambda: (case.draw(),),
        implementations={
            "diffusers": built(partial(run, DDIMScheduler), **of),
            "ours": built(partial(run, OurScheduler), **of),
            "ours, fused": built(partial(run, OurScheduler, fused=True), **of),
        },
        exact=exact,
        passes=2 * steps,
        weights=steps * sum(p.numel() * p.itemsize for p in unet_of(case, channels).parameters()),
        baseline="diffusers",
    )
    return [work]
