"""The source: what one writes in plain torch, as the course did that diffusion_ext goes by.

The network, both sampling loops and the training step, in eager torch, contiguous. State dicts of
dx.nn.ContextUnet load into ContextUnet here, and give the same result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEPS = 500

# --- the network ----------------------------------------------------------------------------------


def conv_norm_gelu(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 1, 1), nn.BatchNorm2d(n_out), nn.GELU())


class ResidualConvBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, is_res: bool = False):
        super().__init__()
        self.is_res, self.same_channels = is_res, n_in == n_out
        self.conv1, self.conv2 = conv_norm_gelu(n_in, n_out), conv_norm_gelu(n_out, n_out)

    def forward(self, x):
        x1 = self.conv1(x)
        x2 = self.conv2(x1)
        if not self.is_res:
            return x2
        return ((x if self.same_channels else x1) + x2) / 1.414


class UnetDown(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        blocks = ResidualConvBlock(n_in, n_out), ResidualConvBlock(n_out, n_out)
        self.model = nn.Sequential(*blocks, nn.MaxPool2d(2))

    def forward(self, x):
        return self.model(x)


class UnetUp(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        blocks = ResidualConvBlock(n_out, n_out), ResidualConvBlock(n_out, n_out)
        self.model = nn.Sequential(nn.ConvTranspose2d(n_in, n_out, 2, 2), *blocks)

    def forward(self, x, skip):
        return self.model(torch.cat((x, skip), 1))


class EmbedFC(nn.Module):
    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.n_in = n_in
        self.model = nn.Sequential(nn.Linear(n_in, n_out), nn.GELU(), nn.Linear(n_out, n_out))

    def forward(self, x):  # [B, n_in] -> [B, n_out, 1, 1]
        return self.model(x.view(-1, self.n_in))[:, :, None, None]


class ContextUnet(nn.Module):
    def __init__(self, in_channels: int, n_feat: int = 256, n_cfeat: int = 10, height: int = 28):
        super().__init__()
        n, side = n_feat, height // 4
        self.init_conv = ResidualConvBlock(in_channels, n, is_res=True)
        self.down1, self.down2 = UnetDown(n, n), UnetDown(n, 2 * n)
        self.to_vec = nn.Sequential(nn.AvgPool2d(side), nn.GELU())
        self.timeembed1, self.timeembed2 = EmbedFC(1, 2 * n), EmbedFC(1, n)
        self.contextembed1, self.contextembed2 = EmbedFC(n_cfeat, 2 * n), EmbedFC(n_cfeat, n)
        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * n, 2 * n, side, side), nn.GroupNorm(8, 2 * n), nn.ReLU()
        )
        self.up1, self.up2 = UnetUp(4 * n, n), UnetUp(2 * n, n)
        self.out = nn.Sequential(
            nn.Conv2d(2 * n, n, 3, 1, 1),
            nn.GroupNorm(8, n),
            nn.ReLU(),
            nn.Conv2d(n, in_channels, 3, 1, 1),
        )

    def forward(self, x, t, c):  # x [B, C, H, W], t [B] or [1], c [B, n_cfeat]
        x = self.init_conv(x)
        down1 = self.down1(x)
        down2 = self.down2(down1)
        up1 = self.up0(self.to_vec(down2))
        up2 = self.up1(self.contextembed1(c) * up1 + self.timeembed1(t), down2)
        up3 = self.up2(self.contextembed2(c) * up2 + self.timeembed2(t), down1)
        return self.out(torch.cat((up3, x), 1))


# --- sampling -------------------------------------------------------------------------------------


class Tables:
    """beta, alpha and alpha_bar, [T+1] each, as tensors."""

    def __init__(self, timesteps: int = TIMESTEPS, device="cpu", dtype=torch.float32):
        of = {"device": device, "dtype": dtype}
        self.timesteps = timesteps
        self.beta = (0.02 - 1e-4) * torch.linspace(0, 1, timesteps + 1, **of) + 1e-4
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.log().cumsum(0).exp()
        self.alpha_bar[0] = 1


def ddim_step(model, x, t, c, ab, ab_prev):
    """t, ab, ab_prev: tensors of one element."""
    eps = model(x, t, c)
    x0 = ab_prev.sqrt() / ab.sqrt() * (x - (1 - ab).sqrt() * eps)
    return x0 + (1 - ab_prev).sqrt() * eps


@torch.no_grad()
def ddim(model, x, c, tables: Tables, steps: int = 20, step=ddim_step) -> Tensor:
    """x [B, C, H, W] from noise to images; steps divides the timesteps."""
    ab, stride = tables.alpha_bar, tables.timesteps // steps
    for i in range(tables.timesteps, 0, -stride):
        t = x.new_full((1,), i / tables.timesteps)
        x = step(model, x, t, c, ab[i], ab[i - stride])
    return x


@torch.no_grad()
def ddpm(model, x, c, tables: Tables, draw=torch.randn_like) -> Tensor:
    """The same by all the steps, with noise."""
    beta, alpha, ab = tables.beta, tables.alpha, tables.alpha_bar
    for i in range(tables.timesteps, 0, -1):
        t = x.new_full((1,), i / tables.timesteps)
        z = draw(x) if i > 1 else 0
        eps = model(x, t, c)
        mean = (x - eps * ((1 - alpha[i]) / (1 - ab[i]).sqrt())) / alpha[i].sqrt()
        x = mean + beta[i].sqrt() * z
    return x


# --- training -------------------------------------------------------------------------------------


def loss_of(model, x0, t, c, noise, ab) -> Tensor:
    """t int64 [B]; ab: alpha_bar [T+1]."""
    level = ab[t, None, None, None]
    x_t = level.sqrt() * x0 + (1 - level).sqrt() * noise
    return F.mse_loss(model(x_t, (t / (len(ab) - 1)).to(x_t), c), noise)


def training_step(model, optimizer, x0, t, c, ab, draw=torch.randn_like, loss_of=loss_of) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, x0, t, c, draw(x0), ab)
    loss.backward()
    optimizer.step()
    return loss.detach()
