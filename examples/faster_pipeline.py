"""A diffusers pipeline, before and after: the same images, and how long they take."""

import time

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import diffusion_ext as dx
from diffusion_ext.integrations import diffusers as fused

blocks = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
unet = UNet2DModel(sample_size=32, block_out_channels=(64, 128, 128), **blocks)
pipe = DDIMPipeline(unet, DDIMScheduler())  # or your own, from_pretrained
pipe.set_progress_bar_config(disable=True)


def draw():
    start = time.perf_counter()
    options = {"num_inference_steps": 5, "output_type": "pt", "return_dict": False}
    images = torch.as_tensor(pipe(2, torch.manual_seed(0), **options)[0])
    return images, time.perf_counter() - start


draw()  # what is made once
before, seconds_before = draw()

print(dx.fuse(pipe.unet.to(memory_format=torch.channels_last)))
pipe.scheduler = fused.DDIMScheduler.from_config(pipe.scheduler.config)

draw()
after, seconds_after = draw()
print(f"{1e3 * seconds_before:.0f} ms before, {1e3 * seconds_after:.0f} ms after")
print(f"largest difference {(after - before).abs().max():.1e}")
