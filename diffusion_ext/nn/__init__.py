"""Networks and layers on the fused ops."""

from .context_unet import ContextUnet
from .group_norm_act import GroupNormAct
from .loading import load_context_unet
from .optimized import OptimizedContextUnet, optimize_for_sampling

__all__ = [
    "ContextUnet", "GroupNormAct", "OptimizedContextUnet", 
    "load_context_unet", "optimize_for_sampling",
]  # fmt: skip
