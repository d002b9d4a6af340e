"""Networks and layers on the fused ops."""

from .context_unet import ContextUnet
from .fuse import FuseReport, fuse, unfuse
from .group_norm_act import GroupNormAct
from .loading import load_context_unet
from .optimized import OptimizedContextUnet, optimize_for_sampling

__all__ = [
    "ContextUnet", "FuseReport", "GroupNormAct", "OptimizedContextUnet", "fuse",
    "load_context_unet", "optimize_for_sampling", "unfuse",
]  # fmt: skip
