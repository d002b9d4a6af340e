"""The convolutions of a network that only infers, without gradients.

Their weights lie as the memory format of the network wants them. On a CPU, in channels_last, our
own convolutions serve float32 where the network is to have them; else, where torch has them,
oneDNN's with packed weights, which torch.compile uses too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.backend import recorded
from ..ops.conv2d import TIMED, serves_conv2d
from .packed_conv2d import PackedConv2d


class OnednnConv3x3:
    """oneDNN's 3x3 convolution with padding 1, and the GELU after it in the same pass.

    Args:
        weight: [K, C, 3, 3], on the CPU. bias: [K]. gelu: whether GELU follows.
        shape: of the inputs [B, C, H, W] that the weights are laid out for; others are taken too.

    A copy shares the weights, which nothing writes to.
    """

    HOW = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool, shape: tuple[int, ...]):
        self.bias, self.act = bias, ("gelu", [], "none") if gelu else ("none", [], "")
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.contiguous(), *self.HOW, list(shape)
        )

    @staticmethod
    def serves(weight: Tensor) -> bool:
        """Whether this torch and this CPU have it for such weights."""
        ops, names = torch.ops.mkldnn, ("_convolution_pointwise", "_reorder_convolution_weight")
        if weight.device.type != "cpu" or not all(hasattr(ops, name) for name in names):
            return False
        if weight.dtype == torch.bfloat16:
            return ops._is_mkldnn_bf16_supported()
        return weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], B > 0 -> [B, K, H, W], channels_last"""
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.HOW, *self.act
        )

    def __deepcopy__(self, memo) -> OnednnConv3x3:
        return self


class Conv3x3(nn.Module):
    """A 3x3 convolution with padding 1, and the GELU after it.

    Args:
        weight: [K, C, 3, 3]. bias: [K]. gelu: whether GELU follows.
        layout: the memory format of its inputs. batch, side: of the images that it is packed for.
        lanes: whether a skip begins at a multiple of 16 channels. ours: whether our convolutions
            serve where they can.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        gelu: bool,
        layout: torch.memory_format,
        batch: int,
        side: int,
        lanes: bool = True,
        ours: bool = TIMED,
    ):
        super().__init__()
        self.weight = frozen(weight.contiguous(memory_format=layout))
        self.bias, self.gelu, self.onednn = frozen(bias), gelu, None
        self.packed = PackedConv2d(self.weight, padding=(1, 1), batch=batch, lanes=lanes)
        self.size, self.layout, self.ours = (batch, side, side), layout, ours
        like = _images(weight, batch, weight.shape[1], side, layout)
        if _ours_serves(self, like):
            self.filters()
        elif layout == torch.channels_last and OnednnConv3x3.serves(weight):
            self.onednn = OnednnConv3x3(self.weight, self.bias, gelu, like.shape)

    def forward(self, x: Tensor, skip: Tensor | None = None, residual: Tensor | None = None):
        """x [B, C, H, W], or its first channels and a skip of the rest -> [B, K, H, W], to which
        residual is added."""
        if _ours_serves(self, x):
            act = "gelu" if self.gelu else "identity"
            return self.packed(x, self.bias, skip=skip, residual=residual, act=act)
        y = self._by_torch(x if skip is None else torch.cat((x, skip), dim=1))
        return y if residual is None else residual + y

    def filters(self) -> Tensor:
        return self.packed.lay_out(*self.size)

    def _by_torch(self, x: Tensor) -> Tensor:
        # torch.compile and other runtimes know no packed weights, and fuse the GELU by themselves.
        written_down = torch.compiler.is_compiling() or recorded()
        if self.onednn is not None and len(x) and not written_down:
            return self.onednn(x)
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        if not self.gelu:
            return y
        return F.gelu(y) if written_down else torch.ops.aten.gelu_(y)


class Unpool(nn.Module):
    """A transposed convolution whose stride is the side of its kernel: one product of matrices.

    Args:
        conv: such a ConvTranspose2d. layout: the memory format of its outputs. dtype: of both.
        ours: whether our convolutions serve where they can.
    """

    def __init__(
        self,
        conv: nn.ConvTranspose2d,
        layout: torch.memory_format,
        dtype: torch.dtype,
        ours: bool = TIMED,
    ):
        super().__init__()
        self.layout, self.ours = layout, ours
        self.weight = frozen(conv.weight.to(dtype, copy=True))
        self.bias = frozen(conv.bias.to(dtype, copy=True))
        self.packed = PackedConv2d(self.weight, transposed=True)
        if _ours_serves(self, _images(self.weight, 1, len(self.weight), 1, layout)):
            self.filters()

    def filters(self) -> Tensor:
        return self.packed.lay_out(1, 1, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], or its first channels and a skip of the rest -> [B, K, side·H, side·W]"""
        if _ours_serves(self, x):
            return self.packed(x, self.bias, skip=skip)
        batch, channels, height, width = x.shape
        _, out_channels, side, _ = self.weight.shape
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [C, side·side·K]
        y = torch.addmm(self.bias.repeat(side**2), _pixels(x), weight[:channels])
        if skip is not None:
            y.addmm_(_pixels(skip), weight[channels:])
        y = y.view(batch, height, width, side, side, out_channels)
        height, width = side * height, side * width
        if self.layout == torch.contiguous_format:
            y = y.permute(0, 5, 1, 3, 2, 4).contiguous()
            return y.view(batch, out_channels, height, width)
        y = y.transpose(2, 3).contiguous().view(batch, height, width, out_channels)
        return y.permute(0, 3, 1, 2)


class Linear(nn.Module):
    """A linear layer, and the GELU after it.

    Args:
        weight: [K, C]. bias: [K]. gelu: whether GELU follows. ours: whether our convolutions serve
            where they can.
    """

    layout = torch.channels_last  # as the one pixel of each sample lies

    def __init__(self, weight: Tensor, bias: Tensor, gelu: bool, ours: bool = TIMED):
        super().__init__()
        self.weight, self.bias, self.gelu, self.ours = frozen(weight), frozen(bias), gelu, ours
        self.packed = PackedConv2d(self.weight)
        if _ours_serves(self, _images(weight, 1, weight.shape[1], 1, self.layout)):
            self.packed.lay_out(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C] -> [B, K]
        pixels = x[:, :, None, None]
        if _ours_serves(self, pixels):
            act = "gelu" if self.gelu else "identity"
            return self.packed(pixels, self.bias, act=act)[:, :, 0, 0]
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


def _ours_serves(layer: Conv3x3 | Unpool | Linear, x: Tensor) -> bool:
    wanted = layer.ours and layer.layout == torch.channels_last and x.dtype == torch.float32
    return wanted and serves_conv2d(x, layer.weight)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _images(like: Tensor, batch: int, channels: int, side: int, layout) -> Tensor:
    of = {"dtype": like.dtype, "device": like.device, "memory_format": layout}
    return torch.empty((batch, channels, side, side), **of)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B·H·W, C], a view of what is channels_last"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
