"""The memory format of a tensor, as its strides tell it."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last (3-D: of [N, C, D, H, W]) where x is that alone, else contiguous_format.

    Of a tensor inside torch.func.vmap, which cannot be asked, it is contiguous_format.
    """
    layout = _CHANNELS_LAST.get(x.dim())
    if layout is None or x.is_contiguous() or torch._C._are_functorch_transforms_active():
        return torch.contiguous_format
    return layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format
