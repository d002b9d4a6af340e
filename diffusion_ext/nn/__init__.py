"""Networks and layers on the fused ops."""

from .context_unet import ContextUnet
from .group_norm_act import GroupNormAct

__all__ = ["ContextUnet", "GroupNormAct"]
