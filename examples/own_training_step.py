"""A training loop that stays yours: noising and loss in two kernels, and the noise lies nowhere."""

import torch

import diffusion_ext as dx

schedule = dx.NoiseSchedule.cosine(timesteps=500)
model = dx.nn.ContextUnet(in_channels=3, n_feat=16, n_cfeat=2, height=16, norm="group")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images = torch.rand(256, 3, 16, 16) * 2 - 1  # yours, in [-1, 1]
classes = torch.eye(2)[torch.arange(256) % 2]

for step in range(8):
    batch = torch.randperm(256)[:32]
    x0, t = images[batch], torch.randint(1, schedule.timesteps + 1, (32,))
    seeds = torch.randint(2**62, (32,))  # of this step's noise
    x_t, _ = dx.perturb(x0, t, schedule, seeds=seeds, target=None)
    output = model(x_t, t / schedule.timesteps, classes[batch])
    losses = dx.denoising_loss(output, x0, t, schedule, seeds=seeds, prediction="v")
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()
    print(f"step {step}  loss {losses.mean().item():.3f}")
