"""GroupNorm with its activation, as a module with torch.nn.GroupNorm's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import Device, check_at_least_1, check_bool, check_choice, check_number
from ..ops import group_norm_act
from ..ops.group_norm_act import ACTIVATIONS


class GroupNormAct(nn.GroupNorm):
    """GroupNorm followed by an activation, in one kernel; a drop-in for the pair of modules.

    Parameters and state-dict keys are those of torch.nn.GroupNorm: `weight`, `bias` [C].

    Args:
        num_groups: G, which divides num_channels. num_channels: C.
        act: "identity", "relu", "silu", "gelu", "gelu_tanh" or "mish".
        eps, affine, device, dtype: as for torch.nn.GroupNorm.

    Raises: ValueError for another act (it stands where torch.nn.GroupNorm has eps), and what
    torch.nn.GroupNorm raises.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        act: str = "silu",
        eps: float = 1e-5,
        affine: bool = True,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("act", act, ACTIVATIONS)
        check_at_least_1("num_groups", num_groups)
        check_at_least_1("num_channels", num_channels)
        check_number("eps", eps)
        check_bool("affine", affine)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.act = act

    def forward(self, x: Tensor, **modulation: Tensor | None) -> Tensor:
        """x [N, C, *spatial] normalised, modulated and activated, in x's dtype and memory format.

        Modulations [N, C] by keyword: scale, shift, post_scale, post_shift and pre_shift, as for
        `diffusion_ext.group_norm_act`, which raises the errors.
        """
        return group_norm_act(
            x, self.num_groups, self.weight, self.bias, self.eps, self.act, **modulation
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"
