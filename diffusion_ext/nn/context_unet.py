"""ContextUnet: a small U-Net that predicts noise, conditioned on the time and on a context vector.

Module names and parameter shapes are a contract: published state dicts load with strict=True.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_choice, check_int, shown
from .batch_norm_act import BatchNormAct
from .group_norm_act import GroupNormAct
from .labels import are_labels, no_context, one_hot
from .state_sizes import SIZES, check_fits
from .winograd_conv2d import WinogradConv2d

RESIDUAL_SCALE = 1.414  # not sqrt(2): the checkpoints were trained with this number
NORM_GROUPS = 8
MOST_SIZE = 2**20

NORMS = ("batch", "group")
NORM_CLASSES = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
SHORTCUTS = ("scaled", "zero", "random")


def _conv_norm_gelu(in_channels: int, out_channels: int, norm: str) -> ConvNormGelu:
    conv = WinogradConv2d(in_channels, out_channels, kernel_size=3, padding=1)
    if norm == "batch":
        return ConvNormGelu(conv, BatchNormAct(out_channels, act="gelu"))
    return ConvNormGelu(conv, GroupNormAct(NORM_GROUPS, out_channels, act="gelu"))


class ConvNormGelu(nn.Sequential):
    """A convolution, and a norm with its GELU, or whatever norm another library put in its place.

    torch.nn.SyncBatchNorm.convert_sync_batchnorm does, and takes no activation over.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W] -> [B, out, H, W]
        conv, norm = self
        y = norm(conv(x))
        acts = isinstance(norm, (BatchNormAct, GroupNormAct)) or not isinstance(norm, NORM_CLASSES)
        return y if acts else F.gelu(y)


class ResidualConvBlock(nn.Module):
    """Two 3x3 convolutions, each normalised and activated, with an optional shortcut around them.

    Where the channel counts differ, `shortcut` says what is added to the second convolution:
    "scaled" the first convolution's output; "random" a fresh 1x1 convolution of the input, drawn on
    every forward and never trained, as the course's file did; "zero" nothing, its expectation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        is_res: bool = False,
        norm: str = "batch",
        shortcut: str = "scaled",
    ):
        super().__init__()
        self.is_res = is_res
        self.same_channels = in_channels == out_channels
        self.shortcut = shortcut
        self.conv1 = _conv_norm_gelu(in_channels, out_channels, norm)
        self.conv2 = _conv_norm_gelu(out_channels, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W] -> [B, out, H, W]
        x1 = self.conv1(x)
        x2 = self.conv2(x1)
        if not self.is_res:
            return x2
        shortcut = self.around(x, x1)
        return (x2 if shortcut is None else shortcut + x2) / RESIDUAL_SCALE

    def around(self, x: Tensor, x1: Tensor) -> Tensor | None:
        """What is added to the second convolution; x1, the first one, is [B, out, H, W]."""
        if self.same_channels:
            return x
        if self.shortcut == "scaled":
            return x1
        return _untrained_conv1x1(x, x1.shape[1]) if self.shortcut == "random" else None


def _untrained_conv1x1(x: Tensor, out_channels: int) -> Tensor:
    """A new nn.Conv2d(C, out_channels, kernel_size=1) of x: the initialisation is uniform."""
    bound = 1 / math.sqrt(x.shape[1])
    weight = x.new_empty(out_channels, x.shape[1], 1, 1).uniform_(-bound, bound)
    bias = x.new_empty(out_channels).uniform_(-bound, bound)
    return F.conv2d(x, weight, bias)


class UnetDown(nn.Module):
    """Two convolution blocks and a halving of the size."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch"):
        super().__init__()
        self.model = nn.Sequential(
            ResidualConvBlock(in_channels, out_channels, norm=norm),
            ResidualConvBlock(out_channels, out_channels, norm=norm),
            nn.MaxPool2d(2),
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, in, H, W] -> [B, out, H/2, W/2]
        return self.model(x)


class UnetUp(nn.Module):
    """A doubling of the size and two convolution blocks, on the input beside the skip."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch"):
        super().__init__()
        self.model = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2),
            ResidualConvBlock(out_channels, out_channels, norm=norm),
            ResidualConvBlock(out_channels, out_channels, norm=norm),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x, skip [B, in/2, H, W] -> [B, out, 2H, 2W]"""
        return self.model(torch.cat((x, skip), dim=1))


class EmbedFC(nn.Module):
    """A two-layer perceptron from a vector to an embedding."""

    def __init__(self, in_features: int, embedding: int):
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(in_features, embedding), nn.GELU(), nn.Linear(embedding, embedding)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, in] -> [B, embedding]
        return self.model(x)


Embeddings: TypeAlias = tuple[Tensor, ...]  # [n or B, 2·n_feat], [n or B, n_feat]


class UnetForward(nn.Module):
    """What a ContextUnet computes, of modules and sizes that are named as its own.

    A run of many steps can have them at once: `prepare` its times and its context, then `predict`
    at each step from one row of the times' embeddings.
    """

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Predicts the noise in x.

        Args:
            x: [B, in_channels, height, height] noised images.
            t: [B], or one value for all (such as [1, 1, 1, 1]): timestep / T, in (0, 1].
            c: [B, n_cfeat] context, or class labels, int64 [B] from 0 to n_cfeat - 1, which stand
                for one-hot vectors; None means no context, a vector of zeros.

        Returns:
            [B, in_channels, height, height], in x's memory format.

        Raises:
            TypeError, ValueError: naming the argument, what came and what is wanted.
        """
        self.check_input(x, t, c)
        return self.predict(x, *self.prepare(t, c))

    def prepare(self, t: Tensor, c: Tensor | None = None) -> tuple[Embeddings, Embeddings]:
        """The embeddings of times t [n] and a context c (see `forward`), in the parameters' dtype.

        Returns: (shift1 [n, 2·n_feat], shift2 [n, n_feat]) of the times, and
        (scale1 [B, 2·n_feat], scale2 [B, n_feat]) of the context, of one row where it is None.
        """
        dtype = next(self.parameters()).dtype
        t = t.to(dtype).reshape(-1, 1)
        if c is None:
            c = t.new_zeros(1, self.n_cfeat)
        elif are_labels(c):
            c = one_hot("c", c, self.n_cfeat, dtype)
        c = c.to(dtype)
        shifts = self.timeembed1(t), self.timeembed2(t)
        return shifts, (self.contextembed1(c), self.contextembed2(c))

    def predict(self, x: Tensor, shifts: Embeddings, scales: Embeddings) -> Tensor:
        """The noise in x [B, in_channels, height, height], from embeddings of B rows or of one."""
        batch = x.shape[0]
        shift1, scale1 = (rows[0].expand(batch, -1) for rows in (shifts, scales))
        shift2, scale2 = (rows[1][:, :, None, None] for rows in (shifts, scales))

        x = self.init_conv(x)  # [B, n, H, H]
        down1 = self.down1(x)  # [B, n, H/2, H/2]
        down2 = self.down2(down1)  # [B, 2n, H/4, H/4]
        hidden = self.to_vec(down2)  # [B, 2n, 1, 1]
        unpool, norm = self.up0
        up1 = norm(unpool(hidden), post_scale=scale1, post_shift=shift1)  # [B, 2n, H/4, H/4]
        up2 = self.up1(up1, down2)  # [B, n, H/2, H/2]
        up3 = self.up2(torch.addcmul(shift2, scale2, up2), down1)  # [B, n, H, H]
        return self.last(up3, x)

    def last(self, up: Tensor, first: Tensor) -> Tensor:
        """The noise, of the last level and the first [B, n, H, H]."""
        return self.out(torch.cat((up, first), dim=1))

    def check_input(self, x: Tensor, t: Tensor, c: Tensor | None) -> None:
        """Raises: TypeError, ValueError for arguments that are not as `forward` wants them."""
        for name, tensor, what in (("x", x, "images"), ("t", t, "timestep / T")):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(
                    f"{name}: wanted a floating point tensor ({what}), got {shown(tensor)}"
                )
        image = [self.in_channels, self.height, self.height]
        if x.dim() != 4 or list(x.shape[1:]) != image:
            wanted = ", ".join(map(str, image))
            raise ValueError(f"x: wanted shape [B, {wanted}], got {list(x.shape)}")
        batch = x.shape[0]
        if t.numel() != 1 and list(t.shape) != [batch]:
            raise ValueError(f"t: wanted shape {[batch]} or one value, got {list(t.shape)}")
        if c is not None:
            self.check_context(c, batch)

    def check_context(self, c, batch: int, name: str = "c") -> None:
        """Raises: TypeError, ValueError for a context that is not as `forward` wants it."""
        vectors = isinstance(c, Tensor) and c.is_floating_point()
        if not vectors and not are_labels(c):
            raise TypeError(no_context(name, c, batch, self.n_cfeat))
        if list(c.shape) != ([batch, self.n_cfeat] if vectors else [batch]):
            raise ValueError(no_context(name, c, batch, self.n_cfeat))


class ContextUnet(UnetForward):
    """U-Net for square images, conditioned on the time t/T and on a context vector.

    Args:
        in_channels: channels of the images.
        n_feat: channels of the first level, a multiple of 8.
        n_cfeat: length of the context vector.
        height: height and width of the images, a multiple of 4.
        norm: normalisation in the convolution blocks: "batch" (BatchNorm2d, the published layout)
            or "group" (GroupNorm of 8 groups, fused with the GELU that follows).
        shortcut: the first block's shortcut, see ResidualConvBlock.
        pool_window: side of the average pooling at the bottom; default height // 4, the whole map.
            The course's file always pools by 4, which at heights 20 to 28 drops the map's border.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        n_feat: int = 256,
        n_cfeat: int = 10,
        height: int = 28,
        *,
        norm: str = "batch",
        shortcut: str = "scaled",
        pool_window: int | None = None,
    ):
        super().__init__()
        _check_configuration(in_channels, n_feat, n_cfeat, height, norm, shortcut)
        bottom = height // 4  # side of the smallest map
        pool_window = bottom if pool_window is None else pool_window
        check_int("pool_window", pool_window)
        if not (pool_window > 0 and bottom // pool_window == 1):
            raise ValueError(
                f"pool_window: wanted a window that pools the {bottom}x{bottom} map to 1x1, "
                f"got {pool_window}"
            )
        self.in_channels = in_channels
        self.n_feat = n_feat
        self.n_cfeat = n_cfeat
        self.height = height
        self.options = {"norm": norm, "shortcut": shortcut, "pool_window": pool_window}

        self.init_conv = ResidualConvBlock(in_channels, n_feat, True, norm, shortcut)
        self.down1 = UnetDown(n_feat, n_feat, norm)
        self.down2 = UnetDown(n_feat, 2 * n_feat, norm)
        self.to_vec = nn.Sequential(nn.AvgPool2d(pool_window), nn.GELU())

        self.timeembed1 = EmbedFC(1, 2 * n_feat)
        self.timeembed2 = EmbedFC(1, n_feat)
        self.contextembed1 = EmbedFC(n_cfeat, 2 * n_feat)
        self.contextembed2 = EmbedFC(n_cfeat, n_feat)

        self.up0 = nn.Sequential(
            nn.ConvTranspose2d(2 * n_feat, 2 * n_feat, bottom, bottom),
            GroupNormAct(NORM_GROUPS, 2 * n_feat, act="relu"),
        )
        self.up1 = UnetUp(4 * n_feat, n_feat, norm)
        self.up2 = UnetUp(2 * n_feat, n_feat, norm)
        self.out = nn.Sequential(
            WinogradConv2d(2 * n_feat, n_feat, kernel_size=3, padding=1),
            GroupNormAct(NORM_GROUPS, n_feat, act="relu"),
            nn.Identity(),  # the ReLU's place, which the layer above has fused: keeps `out.3` there
            nn.Conv2d(n_feat, in_channels, kernel_size=3, padding=1),
        )

    @property
    def configuration(self) -> dict[str, int | str]:
        """The arguments that build this model again: ContextUnet(**model.configuration)."""
        return {name: getattr(self, name) for name in SIZES} | self.options

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """torch's own, which tells in one line whose the weights are where they do not fit.

        Raises: ValueError for the weights of a ContextUnet of other sizes or another norm, before
        any of them is taken; RuntimeError, torch's, for other parameters that do not fit.
        """
        if strict and isinstance(state_dict, Mapping):
            check_fits(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, strict, assign)


def _check_configuration(
    in_channels: int,
    n_feat: int,
    n_cfeat: int,
    height: int,
    norm: str,
    shortcut: str,
) -> None:
    sizes = {
        "in_channels": (in_channels, 1),
        "n_feat": (n_feat, NORM_GROUPS),
        "n_cfeat": (n_cfeat, 1),
        "height": (height, 4),
    }
    for name, (value, factor) in sizes.items():
        check_int(name, value)
        if value < 1 or value % factor:
            wanted = f"a positive multiple of {factor}" if factor > 1 else "at least 1"
            raise ValueError(f"{name}: wanted {wanted}, got {value}")
        if value > MOST_SIZE:
            raise ValueError(f"{name}: wanted at most {MOST_SIZE}, got {value}")
    check_choice("norm", norm, NORMS)
    check_choice("shortcut", shortcut, SHORTCUTS)
