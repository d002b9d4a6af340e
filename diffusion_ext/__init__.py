"""diffusion_ext: fused C++/CUDA kernels, samplers and a UNet for PyTorch diffusion models."""

from . import nn
from .information import info
from .nn import fuse, optimize_for_sampling, unfuse
from .ops import (
    ddim_step,
    ddpm_step,
    group_norm_act,
    perturb,
    philox_normal,
    sampler_step,
    use_backend,
)
from .samplers import (
    StepTable,
    ddim,
    ddim_inversion,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    flow_euler,
)
from .sampling import SampleResult, sample
from .schedules import NoiseSchedule
from .version import __version__

__all__ = [
    "NoiseSchedule",
    "SampleResult",
    "StepTable",
    "__version__",
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
