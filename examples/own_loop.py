"""One kernel a step in a sampling loop that stays yours: DDPM, and DDIM with guidance."""

import torch

import diffusion_ext as dx

schedule = dx.NoiseSchedule.linear(timesteps=500)
model = dx.nn.ContextUnet(in_channels=3, n_feat=32, n_cfeat=5, height=16).eval()
context = torch.eye(5)[:4]


@torch.no_grad()
def ddpm(seeds):
    """Ho et al. 2020, algorithm 2. The noise is made in the kernel, of each sample's seed."""
    x = dx.philox_normal(seeds, (4, 3, 16, 16))
    for t in range(schedule.timesteps, schedule.timesteps - 20, -1):  # the first 20 of 500 steps
        eps = model(x, torch.full((4,), t / schedule.timesteps), context)
        x = dx.ddpm_step(x, eps, t, schedule, seeds=seeds)
    return x


@torch.no_grad()
def ddim(seeds, steps=10, guidance=2.0):
    """Song et al. 2021, with classifier-free guidance (Ho & Salimans 2022)."""
    x = dx.philox_normal(seeds, (4, 3, 16, 16))
    stride = schedule.timesteps // steps
    for t in range(schedule.timesteps, 0, -stride):
        time = torch.full((4,), t / schedule.timesteps)
        without, with_context = model(x, time), model(x, time, context)
        eps = without + guidance * (with_context - without)
        x = dx.ddim_step(x, eps, t, t - stride, schedule)
    return x


seeds = torch.tensor([3, 14, 15, 92])
print(ddpm(seeds).std(), ddim(seeds).std())
