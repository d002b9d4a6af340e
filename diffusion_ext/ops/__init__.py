"""The ops: a checked wrapper each, the torch reference, and the choice between it and a kernel."""

from .backend import current_backend, use_backend
from .group_norm_act import group_norm_act
from .perturb import perturb
from .philox_normal import philox_normal
from .sampler_step import sampler_step
from .single_steps import ddim_step, ddpm_step

__all__ = [
    "current_backend",
    "ddim_step",
    "ddpm_step",
    "group_norm_act",
    "perturb",
    "philox_normal",
    "sampler_step",
    "use_backend",
]
