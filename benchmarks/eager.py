"""The formulas that the fused ops replace, as eager torch writes them.

The passes of each (tensors of x's size that its kernels read or write) stand beside it.
"""

import torch
import torch.nn.functional as F

import diffusion_ext as dx

SCHEDULE = dx.NoiseSchedule.linear(500)
STEP = 250
PREVIOUS = 225  # DDIM's next timestep

SIGNAL, SIGMA = float(SCHEDULE.signal[STEP]), float(SCHEDULE.sigma[STEP])
NEXT_SIGNAL, NEXT_SIGMA = float(SCHEDULE.signal[PREVIOUS]), float(SCHEDULE.sigma[PREVIOUS])
BETA = float(SCHEDULE.beta[STEP])
CLIP = 1.0
GUIDANCE = 7.5


def guided(both):
    """8 passes: both [2B, *] has the unconditional half first."""
    without, given = both.chunk(2)
    return without + GUIDANCE * (given - without)


# --- as the source has them -----------------------------------------------------------------------


def ddpm(x, eps, z=None):
    """Ho et al. 2020, algorithm 2, from eps alone: 12 passes, and one where z is drawn."""
    alpha, alpha_bar = 1 - BETA, SIGNAL**2
    mean = (x - eps * ((1 - alpha) / (1 - alpha_bar) ** 0.5)) / alpha**0.5
    return mean + BETA**0.5 * (torch.randn_like(x) if z is None else z)


def ddim(x, eps):
    """Song et al. 2021, eq. 12, without clipping: 12 passes."""
    return NEXT_SIGNAL / SIGNAL * (x - SIGMA * eps) + NEXT_SIGMA * eps


def perturb(x0, signal, sigma, z=None):
    """7 passes, and one where z is drawn; signal, sigma: [B], of the samples' timesteps."""
    shape = (-1,) + (1,) * (x0.dim() - 1)
    z = torch.randn_like(x0) if z is None else z
    return signal.reshape(shape) * x0 + sigma.reshape(shape) * z, z


def group_norm_silu(x, groups, weight, bias):
    """5 passes: x for its statistics, x and y, y and the result."""
    return F.silu(F.group_norm(x, groups, weight, bias))


# --- as schedulers have them, by x0 ---------------------------------------------------------------


def predicted_x0(x, eps):
    """7 passes."""
    return (x - SIGMA * eps) / SIGNAL


def ddim_clipped(x, eps):
    """DDIM with the data prediction clipped: 16 passes."""
    x0 = predicted_x0(x, eps).clamp(-CLIP, CLIP)
    return NEXT_SIGNAL * x0 + NEXT_SIGMA * eps


def ddpm_by_x0(x, eps, z=None):
    """The posterior (Ho et al. 2020, eq. 7): 19 passes, and one where z is drawn."""
    alpha_bar, alpha = SIGNAL**2, 1 - BETA
    before = alpha_bar / alpha  # alpha_bar of the step before
    of_x0 = before**0.5 * BETA / (1 - alpha_bar)
    of_x = alpha**0.5 * (1 - before) / (1 - alpha_bar)
    mean = of_x0 * predicted_x0(x, eps) + of_x * x
    return mean + BETA**0.5 * (torch.randn_like(x) if z is None else z)
