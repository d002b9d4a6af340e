"""diffusion_ext: fused C++/CUDA kernels, samplers and a UNet for PyTorch diffusion models."""

import sys
from typing import TYPE_CHECKING, Any

from . import nn
from .app.information import info
from .fusing import fuse, unfuse
from .integrations import adapters
from .nn import optimize_for_sampling
from .ops import attention, group_norm_act, philox_normal, use_backend
from .samplers import (
    NoiseSchedule,
    StepTable,
    ddim,
    ddim_inversion,
    ddim_step,
    ddpm,
    ddpm_step,
    deis,
    denoising_loss,
    dpm2,
    dpm2_ancestral,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_ancestral,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    flow_euler,
    flow_heun,
    guided,
    heun,
    ipndm,
    lcm,
    lms,
    perturb,
    plms,
    sa_solver,
    sampler_step,
    tcd,
    unipc,
)
from .sampling import SampleResult, sample
from .version import __version__

if TYPE_CHECKING:
    from .training import load_trained as load

__all__ = [
    "NoiseSchedule",
    "SampleResult",
    "StepTable",
    "__version__",
    "adapters",
    "attention",
    "ddim",
    "ddim_inversion",
    "ddim_step",
    "ddpm",
    "ddpm_step",
    "deis",
    "denoising_loss",
    "dpm2",
    "dpm2_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s_ancestral",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "flow_heun",
    "fuse",
    "group_norm_act",
    "guided",
    "heun",
    "info",
    "ipndm",
    "lcm",
    "lms",
    "load",
    "nn",
    "optimize_for_sampling",
    "perturb",
    "philox_normal",
    "plms",
    "sa_solver",
    "sample",
    "sampler_step",
    "tcd",
    "unfuse",
    "unipc",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`load`, which brings all that training takes; who only samples does without."""
    if name != "load":
        here = sys.modules[__name__]  # whose names Python looks through for the nearest one
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=here)
    from .training import load_trained

    return load_trained


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
