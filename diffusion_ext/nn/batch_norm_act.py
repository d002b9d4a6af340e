"""BatchNorm with its activation, as a module with torch.nn.BatchNorm2d's parameters and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.backend import serves_faster
from ..ops.group_norm_act import with_statistics
from ..ops.reference import ACTIVATIONS


class BatchNormAct(nn.BatchNorm2d):
    """BatchNorm2d (Ioffe & Szegedy 2015) followed by an activation; a drop-in for the two modules.

    In training on channels_last images on the CPU it is one kernel, forward and backward: over a
    batch each channel is a group of its own, so the batch, as one sample of all its pixels, goes to
    group_norm_act with as many groups as channels. Elsewhere torch's batch_norm serves; on a GPU,
    too, where that one sample has not been measured beside it.

    Args: num_features: C. act: one of group_norm_act's.
    Raises: as torch.nn.BatchNorm2d, for one value a channel in training among others.
    """

    def __init__(self, num_features: int, act: str) -> None:
        super().__init__(num_features)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C, H, W]
        pixels = x.permute(0, 2, 3, 1)  # [B, H, W, C]
        fused = self.training and x.is_cpu and serves_faster(x) and pixels.is_contiguous()
        fused = fused and not x.is_contiguous()  # of one channel or pixel: torch's strides
        if not fused or x.numel() <= x.shape[1]:  # one value: torch's error
            return ACTIVATIONS[self.act](super().forward(x))
        one_sample = pixels.flatten(0, 1).unsqueeze(0).permute(0, 3, 1, 2)  # [1, C, B·H, W]
        y, mean, rstd = with_statistics(
            one_sample, self.num_features, self.weight, self.bias, self.eps, self.act, *[None] * 5
        )
        self._track(mean, rstd, one_sample.shape[2:].numel())
        return y.permute(0, 2, 3, 1).view(pixels.shape).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _track(self, mean: Tensor, rstd: Tensor, count: int) -> None:
        """Moves the running statistics towards those of `count` elements; mean, rstd: [1, C]."""
        unbiased = (rstd.double() ** -2 - self.eps) * (count / (count - 1))
        self.running_mean.lerp_(mean[0].to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased[0].to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"
