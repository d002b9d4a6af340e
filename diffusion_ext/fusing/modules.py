"""The classes that `diffusion_ext.fuse` gives to modules it has recognised (see stand_in.py)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ..nn.kept_filters import convolved
from ..nn.kept_filters_3d import convolved_3d
from ..nn.kept_linear import projected
from ..nn.winograd_conv2d import WinogradConv2d
from ..ops.backend import serves_faster
from ..ops.group_norm_act import group_norm_act_unchecked
from ..ops.reference import ACTIVATIONS
from .activations import act_of, passes
from .probing import NormKind
from .stand_in import StandIn, hooked, swap_class

NO_MODULATION = (None,) * 5

# Where torch's autocast computes group_norm, and so returns it, in float32. Its CPU autocast
# leaves the dtype alone.
AUTOCAST_TO_FLOAT32 = ("cuda", "xpu")


def as_probed(module: nn.Module) -> bool:
    """Whether module is configured as it was when `fuse` found out what it computes. While it is
    compiled it is not looked at, and taken to be."""
    known = module.__dict__.get("configuration")
    if known is None or torch.compiler.is_compiling():  # None: of torch's own class
        return True
    deep = known.children is not None
    return known.holds(module) and not _watched_within(module, deep)


def _watched_within(module: nn.Module, deep: bool) -> bool:
    """Whether there are hooks on what module calls; deep: on what that calls, too."""
    children = module._modules.values()
    return any(hooked(child) or (deep and _watched_within(child, deep)) for child in children)


class FusedGroupNorm(StandIn):
    """A group norm that the fused op computes, wherever a kernel of it serves the input."""

    notes = ("carries", "kind", "configuration")
    kind = NormKind()
    carries: str = "identity"  # the activation of the AbsorbedActivation that follows

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if args or kwargs or not as_probed(self):
            return super().forward(input, *args, **kwargs)
        act = carried(self)
        if (y := fused_op(self, input, act)) is not None:
            return y
        # torch.compile takes a stand-in's class for the original, whose own super() it would send
        # back to here.
        written_out = torch.compiler.is_compiling() and not self.kind.frames
        return ACTIVATIONS[act]((self.by_torch if written_out else super().forward)(input))

    def by_torch(self, x: Tensor) -> Tensor:
        """What its class computes."""
        inner = x.float() if self.kind.rounds else x
        y = F.group_norm(inner, self.num_groups, self.weight, self.bias, self.eps).to(x.dtype)
        return ACTIVATIONS[self.kind.act](y)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.carries == "identity" else f", {self.carries}")


class PairedSequential(nn.Sequential):
    """A Sequential that runs each GroupNorm with the activation after it as one op.

    What hands its input through may lie between them. Pairs are looked for on every call, so
    slices, insertions and later hooks keep their meaning.
    """

    def forward(self, input):
        x, modules, i = input, list(self), 0
        while i < len(modules):
            module = modules[i]
            i += 1
            if isinstance(module, FusedGroupNorm):
                after = i
                while after < len(modules) and passes(modules[after]):
                    after += 1
                if after < len(modules) and act_of(modules[after]):
                    x, i = norm_act(module, modules[after], x), after + 1
                    continue
            x = module(x)
        return x


class FusedSequential(StandIn, PairedSequential):
    """A Sequential that `fuse` has taken. Its slices run in pairs too, compiled or not."""

    def __getitem__(self, index):
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return PairedSequential(OrderedDict(list(self._modules.items())[index]))


class AbsorbedActivation(StandIn):
    """An activation that the norm before it computes already: hands its input through.

    It acts itself as soon as that norm does not: once the norm is unfused, or hooked.
    """

    notes = ("absorbed_by",)

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.absorbed_by
        if isinstance(norm, FusedGroupNorm) and carried(norm) != "identity":
            return x
        return super().forward(x)  # the original's, which is the other base of a stand-in

    def extra_repr(self) -> str:
        return type(self).original.__name__


def absorb(norm: FusedGroupNorm, activation: nn.Module) -> None:
    """Move an activation that only ever follows norm into it. A tuple keeps it no submodule."""
    norm.carries = act_of(activation)
    swap_class(activation, AbsorbedActivation)
    activation.__dict__["absorbed_by"] = (norm,)


def carried(norm: FusedGroupNorm) -> str:
    """The activation that norm computes now: none while hooks watch, for they see norms alone."""
    if norm.carries == "identity" or hooked(norm) or _has_any_global_hook():
        return "identity"
    return norm.carries


def norm_act(
    norm: nn.Module,
    activation: nn.Module,
    x: Tensor,
    *,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    rounded_after: bool = False,
) -> Tensor:
    """activation((1 + scale)·norm(x + pre_shift) + shift) [N, C, *spatial]: one op where it can be.

    It can where `fuse` has taken norm, no hook watches a module and a kernel serves x. Otherwise
    the modules are called one after the other.

    Args:
        pre_shift, scale, shift: [N or 1, C] or None; scale and shift come together.
        rounded_after: what follows rounds to autocast's dtype, so that no float32 is made for it.
    """
    act = act_of(activation)
    if (
        act is not None
        and isinstance(norm, FusedGroupNorm)
        and norm.carries == norm.kind.act == "identity"
        and not (hooked(norm) or hooked(activation) or _has_any_global_hook())
        and as_probed(norm)
    ):
        y = fused_op(norm, x, act, pre_shift, scale, shift, rounded_after)
        if y is not None:
            return y

    def over_space(t: Tensor) -> Tensor:
        return t[(...,) + (None,) * (x.dim() - 2)]

    y = norm(x if pre_shift is None else x + over_space(pre_shift))
    if scale is not None:
        y = y * (1 + over_space(scale)) + over_space(shift)
    return activation(y)


def fused_op(
    norm: FusedGroupNorm,
    x: Tensor,
    act: str,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    rounded_after: bool = False,
) -> Tensor | None:
    """`norm_act` as one op; None where the op does not serve, or where torch is to raise its error.

    These, and the kernel's own, are all the checks of a call: the op's would double them.
    """
    if not isinstance(x, Tensor) or not serves_faster(x) or x.layout is not torch.strided:
        return None
    kind = norm.kind
    if kind.act != "identity":
        if act != "identity" or _has_any_global_hook():
            return None
        act = kind.act
    modulation = NO_MODULATION
    if pre_shift is not None or scale is not None:
        rows = scale, shift, pre_shift
        if not all(_is_of_rows(t, x) for t in rows):
            return None
        rows = [t if t is None else t.expand(x.shape[0], -1) for t in rows]
        modulation = (*rows[:2], None, None, rows[2])
    frames = None
    if x.dim() not in kind.dims:
        if not kind.frames or x.dim() != 5 or modulation is not NO_MODULATION:
            return None
        frames = x.transpose(1, 2)  # [N, F, C, H, W], which are normalised one by one
        x = frames.flatten(0, 1)
    try:  # since a module's attributes take their time
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    except KeyError:
        weight, bias = norm.weight, norm.bias
    if weight is not None and (weight.dim() != 1 or weight.is_meta):
        return None  # the kernel takes a row for each sample too
    if bias is not None and (bias.dim() != 1 or bias.is_meta):
        return None
    x = x if rounded_after else promoted(norm, x)
    try:
        y = group_norm_act_unchecked(x, norm.num_groups, weight, bias, norm.eps, act, *modulation)
    except RuntimeError:  # what a kernel refuses torch refuses too, in words of its own
        return None
    return y if frames is None else y.unflatten(0, frames.shape[:2]).transpose(1, 2)


def _is_of_rows(t: Tensor | None, x: Tensor) -> bool:
    """Whether t is a modulation [N or 1, C] of x, or none."""
    if t is None:
        return True
    samples, channels = x.shape[:2]
    fits = t.dim() == 2 and t.shape[1] == channels and t.shape[0] in (1, samples)
    return fits and t.dtype == x.dtype and t.device == x.device


def promoted(norm: FusedGroupNorm, x: Tensor) -> Tensor:
    """x in the dtype that norm's result has under the autocast of the moment."""
    if x.dtype == torch.float32 or norm.kind.rounds:
        return x
    if x.device.type not in AUTOCAST_TO_FLOAT32:
        return x
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def convolved_by(conv: nn.Module, x: Tensor, repeat: int = 1, **after) -> Tensor | None:
    """`convolved` of conv(x), where conv is ours and nobody watches it; else None."""
    if not isinstance(conv, WinogradConv2d) or hooked(conv) or _has_any_global_hook():
        return None
    return convolved(conv, x, repeat, **after) if as_probed(conv) else None


class FusedConv2d(StandIn, WinogradConv2d):
    """A Conv2d that `fuse` has taken, or of a subclass that computes the same."""

    notes = ("configuration",)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        usual = not (args or kwargs) and as_probed(self)
        y = convolved(self, input) if usual and "_conv_forward" not in self.__dict__ else None
        return super(WinogradConv2d, self).forward(input, *args, **kwargs) if y is None else y


def projected_by(layer: nn.Module, x: Tensor, **after) -> Tensor | None:
    """`projected` of layer(x), where `fuse` has taken layer and nobody watches it; else None."""
    if not isinstance(layer, FusedLinear) or hooked(layer) or _has_any_global_hook():
        return None
    return projected(layer, x, **after) if as_probed(layer) else None


class FusedLinear(StandIn):
    """A Linear that `fuse` has taken, or of a subclass that computes the same."""

    notes = ("configuration",)

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        y = None if args or kwargs or not as_probed(self) else projected(self, input)
        return super().forward(input, *args, **kwargs) if y is None else y


class FusedConv3d(StandIn):
    """A Conv3d that `fuse` has taken, or of a subclass that runs Conv3d's forward on what it has
    made of its input: causal ones pad it before."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (y := convolved_3d(self, input, weight, bias)) is not None:
            return y
        return nn.Conv3d._conv_forward(self, input, weight, bias)
