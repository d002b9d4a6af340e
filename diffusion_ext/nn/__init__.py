"""Networks and layers on the fused ops."""

from .context_unet import ContextUnet
from .fuse import FuseReport, fuse, unfuse
from .group_norm_act import GroupNormAct
from .loading import load_context_unet

__all__ = [
    "ContextUnet", "FuseReport", "GroupNormAct", "fuse", "load_context_unet", "unfuse",
]  # fmt: skip
