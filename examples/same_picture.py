"""A picture depends on its seed alone: not on its batch, nor on what was drawn before it."""

import torch

import diffusion_ext as dx

schedule = dx.NoiseSchedule.linear(timesteps=500)
model = dx.nn.ContextUnet(in_channels=3, n_feat=16, n_cfeat=2, height=16).eval()
table = dx.euler_ancestral(schedule, steps=10)  # one that draws noise at every step


def draw(seeds):
    shape = (len(seeds), 3, 16, 16)
    return dx.sample(model, shape, table, seeds=torch.tensor(seeds), progress=False).images


batch = draw([7, 8, 9, 10])
alone = draw([9])
difference = (batch[2] - alone[0]).abs().max()
print(f"seed 9 in a batch of four and alone: they differ by {difference:.0e}")
assert difference < 1e-3  # a network's sums may round otherwise in another batch
