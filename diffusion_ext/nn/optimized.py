"""optimize_for_sampling: a copy of a ContextUnet that only infers, and does so faster."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..checks import check_at_least_1, check_dtype, kind, networks_of, shown
from ..ops import choices, measuring
from ..ops.conv2d import CHANNELS, TIMED, VECTORISED
from ..ops.layouts import layout_of
from ..ops.wide import wide
from .context_unet import (
    RESIDUAL_SCALE,
    ContextUnet,
    Embeddings,
    EmbedFC,
    ResidualConvBlock,
    UnetForward,
    UnetUp,
)
from .convolutions import Conv3x3, Linear, Unpool
from .one_call import OneCall

EMBEDDINGS = ("timeembed1", "timeembed2", "contextembed1", "contextembed2")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
TURN = 0.02  # seconds for which a memory format is timed, at least once, in each round


def optimize_for_sampling(
    model: ContextUnet,
    batch: int = 32,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> OptimizedContextUnet:
    """A faster copy of a ContextUnet for inference, to hand to `sample` in its place.

    BatchNorms and the residual's division are folded into the convolutions, whose weights are laid
    out once. GELU, residual and concatenation run in the convolutions' own pass. Transposed
    convolutions are matrix products. The copy does not follow the original: after new weights, make
    it again. It cannot move to another device, and has no gradients.

    Args:
        model: in either mode; the copy is in evaluation mode.
        batch: the number of images that it shall be fastest for; guidance doubles it. It takes any
            number.
        dtype: of the convolutions, by default the model's: torch.bfloat16 or torch.float16 for half
            precision. The embeddings, and what `sample` does between, keep the model's.
        memory_format: of the images inside. None times torch.contiguous_format and
            torch.channels_last once on this machine, takes the faster (`.memory_format` says which)
            and keeps the choice in a file, which `info` shows. The two round differently: name one
            for the same bits on every machine. On ARM, channels_last is timed with our convolutions
            too; where it is named, torch's serve there.

    The outputs are the model's to rounding: to 1e-5 of the largest in float32, 3e-2 in bfloat16.

    Returns: OptimizedContextUnet. Raises: TypeError, ValueError.
    """
    if type(model) is not ContextUnet:
        raise TypeError(f"model: wanted a ContextUnet, got {kind(model)}{networks_of(model)}")
    check_at_least_1("batch", batch)
    dtype = model.out[0].weight.dtype if dtype is None else dtype
    check_dtype(dtype)
    if memory_format is not None and memory_format not in LAYOUTS:
        raise ValueError(
            f"memory_format: wanted one of {LAYOUTS} or None, got {shown(memory_format)}"
        )
    with torch.inference_mode(False), torch.no_grad():
        if memory_format is None:
            return _faster(model, batch, dtype)
        return OptimizedContextUnet(model, batch, dtype, memory_format)


def _in_its_own_dtype(method: Callable) -> Callable:
    """Without autocast: the copy was made for one dtype."""

    @functools.wraps(method)
    def without_autocast(self, x: Tensor, *arguments, **options):
        if not torch.is_autocast_enabled(x.device.type):
            return method(self, x, *arguments, **options)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *arguments, **options)

    return without_autocast


class OptimizedContextUnet(UnetForward):
    """What `optimize_for_sampling` makes; it is called as the ContextUnet is."""

    def __init__(
        self,
        model: ContextUnet,
        batch: int,
        dtype: torch.dtype,
        layout: torch.memory_format,
        ours: bool = TIMED,
    ):
        super().__init__()
        self.in_channels, self.n_feat = model.in_channels, model.n_feat
        self.n_cfeat, self.height = model.n_cfeat, model.height
        self.dtype, self.memory_format, self.ours = dtype, layout, ours
        height, shrink = self.height, 1 / RESIDUAL_SCALE  # which the first block leaves to others
        make = _Maker(batch, dtype, layout, ours)

        for name in EMBEDDINGS:
            setattr(self, name, make.embedding(getattr(model, name)))
        self.to_vec, self.pool_window = _copied(model.to_vec), model.options["pool_window"]
        self.init_conv = _FirstBlock(model.init_conv, make, height)
        down1, down2 = model.down1.model, model.down2.model
        self.down1 = nn.Sequential(*make.blocks(down1[:2], height, shrink), down1[2])
        self.down2 = nn.Sequential(*make.blocks(down2[:2], height // 2), down2[2])
        self.up0 = nn.ModuleList([make.unpool(model.up0[0]), _copied(model.up0[1])])
        self.up1 = _Up(model.up1, make, height // 2)
        self.up2 = _Up(model.up2, make, height)
        conv, norm, _, last = model.out
        shrinks = conv.weight.new_ones(2 * self.n_feat, 1, 1)
        shrinks[self.n_feat :] = shrink
        conv = make.conv(conv, height, shrinks, lanes=self.n_feat % CHANNELS == 0)
        last = make.conv(last, height)
        self.out = nn.Sequential(conv, _copied(norm), last)
        self.eval().requires_grad_(False)
        self.one_call = OneCall(self)

    @torch.no_grad()
    @_in_its_own_dtype
    def prepare(self, t: Tensor, c: Tensor | None = None) -> tuple[Embeddings, Embeddings]:
        embeddings = super().prepare(t, c)  # in the model's dtype
        return tuple(tuple(e.to(self.dtype) for e in part) for part in embeddings)

    @torch.no_grad()
    @_in_its_own_dtype
    def predict(self, x: Tensor, shifts: Embeddings, scales: Embeddings) -> Tensor:
        inputs = x.to(self.dtype, memory_format=self.memory_format)
        predict = self.one_call if self.one_call.serves(inputs) else super().predict
        y = predict(inputs, shifts, scales)
        return y.to(x.dtype, memory_format=layout_of(x))

    def last(self, up: Tensor, first: Tensor) -> Tensor:
        conv, norm, last = self.out
        return last(norm(conv(up, first)))

    def _apply(self, fn, recurse=True):
        raise RuntimeError(
            "an optimized copy keeps its device and dtype: move the original, then "
            "optimize_for_sampling it again"
        )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            "an optimized copy keeps its weights: load the original's, then "
            "optimize_for_sampling it again"
        )


class _Maker:
    """Makes the layers of one optimized network."""

    def __init__(self, batch: int, dtype: torch.dtype, layout: torch.memory_format, ours: bool):
        self.batch, self.dtype, self.layout, self.ours = batch, dtype, layout, ours

    def conv(
        self, conv: nn.Conv2d, side: int, scale: Tensor | float = 1.0, norm=None, lanes: bool = True
    ) -> Conv3x3:
        """conv(scale·x), of inputs of that side, and the BatchNorm and GELU where norm is one."""
        weight, bias = wide(conv.weight), wide(conv.bias)
        if norm is not None:
            statistics = wide(norm.running_mean), wide(norm.running_var), norm.eps
            weight, bias = fuse_conv_bn_weights(
                weight, bias, *statistics, wide(norm.weight), wide(norm.bias)
            )
        weight = weight * (wide(scale) if isinstance(scale, Tensor) else scale)
        weight, bias = (p.to(conv.weight.device, self.dtype) for p in (weight, bias))
        size = self.batch, side
        return Conv3x3(weight, bias, norm is not None, self.layout, *size, lanes, self.ours)

    def unpool(self, conv: nn.ConvTranspose2d) -> Unpool:
        return Unpool(conv, self.layout, self.dtype, self.ours)

    def embedding(self, embed: EmbedFC) -> EmbedFC:
        """A copy whose layers are products of ours, where those serve."""
        embed = _copied(embed)
        first, _, last = embed.model
        layers = [
            Linear(layer.weight, layer.bias, gelu, self.ours)
            for layer, gelu in ((first, True), (last, False))
        ]
        embed.model = nn.Sequential(*layers)
        return embed

    def half(self, half: nn.Sequential, side: int, scale: float = 1.0) -> nn.Module:
        """A half of a ResidualConvBlock."""
        conv, norm = half[:2]
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            return self.conv(conv, side, scale, norm)
        return _ConvNorm(self.conv(conv, side, scale), _copied(norm))

    def blocks(self, blocks, side: int, scale: float = 1.0) -> list[nn.Module]:
        """ResidualConvBlocks without a residual, one after another, on scale·x."""
        halves = [half for block in blocks for half in (block.conv1, block.conv2)]
        scales = [scale] + [1.0] * (len(halves) - 1)
        return [self.half(half, side, s) for half, s in zip(halves, scales, strict=True)]


class _ConvNorm(nn.Sequential):
    """A convolution and a norm with its GELU."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, norm = self
        y = norm(conv(x))
        return y if residual is None else residual + y


class _FirstBlock(ResidualConvBlock):
    """A ResidualConvBlock with a residual, which is not divided by RESIDUAL_SCALE."""

    def __init__(self, block: ResidualConvBlock, make: _Maker, side: int):
        nn.Module.__init__(self)
        self.same_channels, self.shortcut = block.same_channels, block.shortcut
        self.conv1, self.conv2 = make.half(block.conv1, side), make.half(block.conv2, side)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        return self.conv2(x1, residual=self.around(x, x1))


class _Up(nn.Module):
    """A UnetUp that does not concatenate its inputs."""

    def __init__(self, up: UnetUp, make: _Maker, side: int):
        super().__init__()
        self.unpool = make.unpool(up.model[0])
        self.blocks = nn.Sequential(*make.blocks(up.model[1:], side))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.blocks(self.unpool(x, skip))


def _copied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def _faster(model: ContextUnet, batch: int, dtype: torch.dtype) -> OptimizedContextUnet:
    """The network in the way in which a forward takes the least time here."""
    device = model.timeembed1.model[0].weight.device
    of = f"optimize_for_sampling, ContextUnet, batch {batch}, {dtype}"
    detail = repr(model.configuration)
    known = choices.find(of, detail, device)
    ways = {str(layout): (layout, TIMED) for layout in LAYOUTS}
    if VECTORISED and not TIMED:
        ways["torch.channels_last, our convolutions"] = torch.channels_last, True
    make = partial(OptimizedContextUnet, model, batch, dtype)
    if known is not None and known.taken in ways:
        return make(*ways[known.taken])
    networks = {name: make(*way) for name, way in ways.items()}
    forwards = {name: partial(_forwards, network, batch) for name, network in networks.items()}
    measured = measuring.measure(forwards, device, TURN)
    taken = min(measured.seconds, key=measured.seconds.get)
    choices.keep(of, detail, device, taken, measured)
    return networks[taken]


def _forwards(network: OptimizedContextUnet, batch: int) -> measuring.Calls:
    like, side = network.timeembed1.model[0].weight, network.height
    x, times = like.new_zeros(batch, network.in_channels, side, side), like.new_ones(1)
    x = x.contiguous(memory_format=network.memory_format)
    return itertools.repeat(partial(network, x, times))
