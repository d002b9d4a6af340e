"""The layers of an optimized ContextUnet in one call: calls are what one small picture costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops.context_unet import context_unet
from ..ops.conv2d import serves_conv2d
from .convolutions import Conv3x3, Unpool
from .packed_conv2d import version_of


class OneCall:
    """predict(x, shifts, scales) of an OptimizedContextUnet, where it is float32 and channels_last,
    its BatchNorms are folded and its convolutions ours.

    Copies and pickles of the network share or make the filters anew, as its convolutions do.
    """

    def __init__(self, network: nn.Module):
        self.modules = list(network.modules())
        init, up0, out = network.init_conv, network.up0, network.out
        self.convs = [init.conv1, init.conv2, *network.down1[:4], *network.down2[:4], up0[0]]
        for up in (network.up1, network.up2):
            self.convs += [up.unpool, *up.blocks]
        self.convs += [out[0], out[2]]
        self.norms = up0[1], out[1]
        self.window = network.pool_window
        self.shortcut = "input" if init.same_channels else "first"
        if not init.same_channels and init.shortcut != "scaled":
            self.shortcut = None
        folded = all(isinstance(conv, (Conv3x3, Unpool)) for conv in self.convs)
        ours = network.ours and network.memory_format == torch.channels_last
        self.possible = folded and ours and init.shortcut != "random"
        self.layers = self.versions = None  # filters, biases, norms; of the weights

    def serves(self, x: Tensor) -> bool:
        """Whether it computes what the layers would, and nobody watches those."""
        if not self.possible or torch.compiler.is_compiling() or not len(x):
            return False
        if x.dtype != torch.float32:
            return False
        return serves_conv2d(x, self.convs[0].weight) and not self._watched()

    def _watched(self) -> bool:
        for module in self.modules:
            if module._forward_hooks or module._forward_pre_hooks:
                return True
        return _has_any_global_hook()

    def __call__(self, x: Tensor, shifts: tuple, scales: tuple) -> Tensor:
        convs = self.convs
        versions = [version_of(conv.packed.weight) for conv in convs]
        if self.versions != versions:
            self.versions = versions
            norms = [t for norm in self.norms for t in (norm.weight, norm.bias)]
            self.layers = [c.filters() for c in convs], [c.bias for c in convs], norms
        norm = self.norms[0]
        how = norm.num_groups, norm.eps, self.shortcut, self.window
        return context_unet(x, scales, shifts, *self.layers, *how)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"layers": None, "versions": None}
