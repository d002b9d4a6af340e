"""The ops: a checked wrapper each, the torch reference, and the choice between it and a kernel."""

from .attention import attention
from .backend import current_backend, use_backend
from .group_norm_act import group_norm_act
from .philox_normal import philox_normal
from .sampler_step import sampler_step

__all__ = [
    "attention",
    "current_backend",
    "group_norm_act",
    "philox_normal",
    "sampler_step",
    "use_backend",
]
