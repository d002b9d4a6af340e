"""What runs a network fastest on this machine: engine="auto" times every way once and remembers."""

import torch

import diffusion_ext as dx

schedule = dx.NoiseSchedule.linear(timesteps=500)
model = dx.nn.ContextUnet(in_channels=3, n_feat=32, n_cfeat=5, height=16).eval()
table = dx.ddim(schedule, steps=20)
labels = torch.arange(4)

result = dx.sample(model, (4, 3, 16, 16), table, labels, guidance_scale=2.0, engine="auto")
print(f"taken: {result.engine}")
for choice in dx.info().choices:
    print(choice.of, choice, sep="\n  ")
