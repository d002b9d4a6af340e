"""The right half of a picture anew, by any sampler; the left half stays as it is."""

import torch

import diffusion_ext as dx

schedule = dx.NoiseSchedule.linear(timesteps=500)
model = dx.nn.ContextUnet(in_channels=3, n_feat=16, n_cfeat=2, height=16).eval()
table = dx.dpmpp_2m(schedule, steps=10)

picture = torch.rand(1, 3, 16, 16) * 2 - 1  # yours, in [-1, 1]
mask = torch.zeros(1, 1, 16, 16)
mask[..., 8:] = 1  # 1: to be drawn
result = dx.sample(model, (1, 3, 16, 16), table, start=picture, mask=mask, seeds=7, progress=False)

kept = (result.images[..., :8] - picture[..., :8]).abs().max()
print(f"the left half differs by {kept:.0e}")
assert kept < 1e-5
