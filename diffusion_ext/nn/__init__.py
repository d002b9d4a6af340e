"""Networks and layers on the fused ops."""

from .context_unet import ContextUnet
from .fuse import FuseReport, fuse, unfuse
from .group_norm_act import GroupNormAct

__all__ = ["ContextUnet", "FuseReport", "GroupNormAct", "fuse", "unfuse"]
