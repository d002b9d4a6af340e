"""diffusion_ext: fused C++/CUDA kernels, samplers and a UNet for PyTorch diffusion models."""

from . import nn
from .app.information import info
from .fusing import fuse, unfuse
from .integrations import adapters
from .nn import optimize_for_sampling
from .ops import group_norm_act, philox_normal, sampler_step, use_backend
from .samplers import (
    NoiseSchedule,
    StepTable,
    ddim,
    ddim_inversion,
    ddim_step,
    ddpm,
    ddpm_step,
    dpmpp_2m,
    euler,
    euler_ancestral,
    flow_euler,
    guided,
    perturb,
)
from .sampling import SampleResult, sample
from .version import __version__

__all__ = [
    "NoiseSchedule",
    "SampleResult",
    "StepTable",
    "__version__",
    "adapters",
    "ddim",
    "ddim_inversion",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "fuse",
    "group_norm_act",
    "guided",
    "info",
    "nn",
    "optimize_for_sampling",
    "perturb",
    "philox_normal",
    "sample",
    "sampler_step",
    "unfuse",
    "use_backend",
]
