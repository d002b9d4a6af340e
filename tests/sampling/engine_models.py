"""What the engines' tests run: models of every kind, and tables."""

from __future__ import annotations

import torch
from torch import nn

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(100)
SHAPE = (2, 3, 8, 8)
TABLES = {
    "ddim": dx.ddim(SCHEDULE, 5),
    "noise": dx.ddim(SCHEDULE, 5, eta=1.0, clip=1.5),
    "two steps back": dx.dpmpp_2m(SCHEDULE, 5, "karras"),
    "ddpm": dx.ddpm(dx.NoiseSchedule.linear(12)),
    "two calls a step": dx.dpmpp_sde(SCHEDULE, 3),
    "predictor and corrector": dx.unipc(SCHEDULE, 5, order=3),
}


class Network(nn.Module):
    """A network of times and contexts, with a weight and a buffer."""

    n_cfeat = 3

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x, t, c):
        shift = t.to(x.dtype).reshape(-1, 1, 1, 1)
        shift = shift if c is None else shift + c.sum(1).reshape(-1, 1, 1, 1)
        return torch.tanh(self.conv(x) * self.scale.to(x.dtype) + shift)


def unet(**options):
    torch.manual_seed(0)
    return dx.nn.ContextUnet(3, 8, 3, 8, **options).eval()


MODELS = {
    "any": Network,
    "ContextUnet": unet,
    "optimized": lambda: dx.optimize_for_sampling(unet(), memory_format=torch.channels_last),
}


def draw(model, table=TABLES["ddim"], shape=SHAPE, **options):
    return dx.sample(model, shape, table, progress=False, **options)
