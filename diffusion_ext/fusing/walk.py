"""fuse(model): a model's GroupNorms, with the activations after them, its convolutions, its linear
layers and its attention on our ops."""

from __future__ import annotations

import itertools
import sys
from collections import Counter

from torch import nn
from torch.nn.parameter import is_lazy

from ..checks import kind, networks_of
from ..nn import kept_filters, kept_filters_3d, kept_linear
from ..nn.group_norm_act import GroupNormAct
from ..nn.kept_weights import forget
from ..nn.winograd_conv2d import WinogradConv2d
from ..ops.layouts import suggests_channels_last
from .activations import ALONE, found_act_of, pair_kind, passes
from .attention import FusedAttention, fuse_attention
from .embedded_blocks import fuse_embedded_block
from .feed_forward import Form, fuse_projection
from .modulated import fuse_adaptive_norm
from .modules import (
    FusedConv2d,
    FusedConv3d,
    FusedGroupNorm,
    FusedLinear,
    FusedSequential,
    PairedSequential,
)
from .probing import (
    computes_conv2d,
    computes_linear,
    configuration,
    looks_like_a_group_norm,
    norm_kind,
    runs_conv3d,
)
from .report import FuseReport
from .stand_in import StandIn, hooked, restore_class, swap_class

CONVOLUTIONS = nn.modules.conv._ConvNd


def fuse(model: nn.Module) -> FuseReport:
    """Make a model faster, in place: its GroupNorms, the activations after them, its convolutions,
    its linear layers, its attention.

    Norms: whatever computes a group norm, as its results tell (see probing.py), with an activation
    of its own too, and adaptive norms, whose scale and shift come from an embedding. The activation
    after a norm is fused with it where the structure proves that it follows: neighbours in an
    nn.Sequential, with an Identity or an idle dropout between them or not; diffusers' ResnetBlock2D
    and guided-diffusion's residual blocks, with their embedding; the output norms of diffusers'
    UNets and autoencoders.

    Convolutions: on a CPU, where the weight or the images are channels_last, and where that gains
    on torch's; so move the model to channels_last. Without gradients, weights are laid out once, in
    memory of their own (see `FuseReport`), and again when they change. With gradients, in float32,
    3x3 filters of stride 1 and padding 1 run by Winograd's algorithm. Conv3d, without gradients
    alone: filters of 3x3 in each frame and stride 1 there, in either memory format; those of one
    pixel in channels_last_3d.

    Linear layers: on a CPU, without gradients, where that gains on torch's; their weights are laid
    out as those of convolutions are. The activation or the gate of a feed-forward (GELU, GEGLU,
    SwiGLU and others of their form) is computed in the same pass.

    Float16 and bfloat16 are served where torch's own products are no faster (see
    docs/convolutions.md).

    Attention: on a CPU, without gradients, wherever a module, or its processor, calls torch's
    scaled_dot_product_attention and `attention` gains on that.

    Parameters, module names, the state dict and the module objects stay; only their classes change.
    A new class stands in for the old one (see stand_in.py), so that adapters and other wrappers
    find what they look for. Modules with hooks, and those that compute something else, are left as
    they are. Where no kernel serves an input (float64, another device), a fused module
    computes as before. Fuse before torch.compile. A pickle of the model needs diffusion_ext.

    Returns: FuseReport of every norm, convolution and linear layer; print it, or its details().
        Fusing again changes nothing.
    Raises: TypeError unless model is a torch.nn.Module.
    """
    _check(model)
    kinds: dict[nn.Module, str] = {}  # fused norm -> how
    reasons: dict[nn.Module, str] = {}  # norm, convolution or linear layer that is left -> why
    diffusers = _diffusers_blocks()
    for module in model.modules():
        how, why = _fuse_norm(module)
        if how is None:
            why = _fuse_convolution(module) or _fuse_linear(module) or why
        if how is not None:
            kinds[module] = how
        elif why is not None:
            reasons[module] = why
        if diffusers is not None:
            diffusers.fuse_upsampling(module)
    references = Counter(child for m in model.modules() for child in m._modules.values())
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            kinds.update(_fuse_sequential(module))
    known: dict[tuple, bool] = {}
    forms: dict[tuple, Form | None] = {}
    for module in model.modules():
        kinds.update(_fuse_block(module, references, known))
        fuse_projection(module, forms)
        fuse_attention(module)
    return _report(model, kinds, reasons)


def _report(model: nn.Module, kinds: dict, reasons: dict) -> FuseReport:
    report = FuseReport()
    for name, module in model.named_modules():
        name = name or "(model)"
        if isinstance(module, WinogradConv2d):
            report.convolutions.append(name)
            report.filter_bytes += kept_filters.filter_bytes(module)
            report.contiguous += not suggests_channels_last(module.weight)
        elif isinstance(module, FusedConv3d):
            report.convolutions.append(name)
            report.filter_bytes += kept_filters_3d.filter_bytes_3d(module)
        elif isinstance(module, FusedLinear):
            report.linears.append(name)
            report.linear_bytes += kept_linear.weight_bytes(module)
        elif isinstance(module, FusedAttention):
            report.attentions.append(name)
        elif module in kinds:
            report.fused.append((name, kinds[module]))
        elif module in reasons:
            report.left.append((name, reasons[module]))
    return report


def unfuse(model: nn.Module) -> None:
    """Give every module that `fuse` changed the class it had: types and results are as before.

    Modules whose forward was replaced since (accelerate's hooks) stay fused until that is undone.

    Raises: TypeError unless model is a torch.nn.Module.
    """
    _check(model)
    for module in model.modules():
        forget(module)
        restore_class(module)
        if type(module) is PairedSequential:  # a slice that became a module
            module.__class__ = nn.Sequential


def _check(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted a torch.nn.Module, got {kind(model)}{networks_of(model)}")


def _fuse_norm(module: nn.Module) -> tuple[str | None, str | None]:
    """Fuse module, if it is a group norm. Returns: how, of one that is fused; why not, of a norm
    that is left."""
    cls = type(module)
    if fuse_adaptive_norm(module):
        return f"{ALONE}, modulated", None
    if not (isinstance(module, nn.GroupNorm) or looks_like_a_group_norm(module)):
        why = "has hooks" if hooked(module) else f"{cls.__name__}: no group norm"
        return None, why if _is_a_norm(module) else None
    if isinstance(module, GroupNormAct):
        return None, "GroupNormAct: on the fused op already"
    if not isinstance(module, FusedGroupNorm):
        if (why := _why_untouched(module)) is not None:
            return None, why
        if not module.eps > 0:
            return None, f"eps is {module.eps}"
        torchs = cls is nn.GroupNorm
        of = None if torchs else configuration(module)
        kind = norm_kind(module) if torchs or of is not None else None
        if kind is None:
            return None, f"{cls.__name__}: computes something else than a group norm"
        swap_class(module, FusedGroupNorm)
        if not torchs:
            module.__dict__.update(kind=kind, configuration=of)
    if hooked(module):
        return None, "has hooks"
    act = module.kind.act
    return ALONE if act == "identity" else f"with its {act}", None


def _is_a_norm(module: nn.Module) -> bool:
    """Whether module is called a norm, and has none within it, which would be named."""
    called = "norm" in type(module).__name__.lower() and not isinstance(module, CONVOLUTIONS)
    return called and not any(map(_is_a_norm, module.children()))


def _is_a_convolution(module: nn.Module) -> bool:
    """Whether module is one of torch's convolutions, or has a weight as only they have."""
    if isinstance(module, CONVOLUTIONS):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and not is_lazy(weight) and weight.dim() >= 3


def _fuse_convolution(conv: nn.Module) -> str | None:
    """Fuse conv, if ours can serve it. Returns: why not, of a convolution that is left."""
    if not _is_a_convolution(conv) or isinstance(conv, (WinogradConv2d, FusedConv3d)):
        return None
    cls = type(conv)
    if cls is nn.Conv1d:
        return "Conv1d: torch's is as fast"
    moving = isinstance(conv, nn.Conv3d)
    if not moving and not isinstance(conv, nn.Conv2d):
        return f"{cls.__name__}: no Conv2d or Conv3d"
    if (reason := _why_untouched(conv)) is not None:
        return reason
    if not (kept_filters_3d.packs_3d if moving else kept_filters.packs)(conv):
        return _settings(conv)
    if isinstance(conv, nn.modules.lazy.LazyModuleMixin):
        return f"{cls.__name__}: has no weight yet"
    return (_take_conv3d if moving else _take_conv2d)(conv)


def _take_conv2d(conv: nn.Conv2d) -> str | None:
    """`_fuse_convolution` of a Conv2d whose settings ours have."""
    cls = type(conv)
    if not kept_filters.may_gain(conv):
        return "torch's is faster for so few channels"
    torchs = cls.forward is nn.Conv2d.forward and cls._conv_forward is nn.Conv2d._conv_forward
    return _swap(conv, FusedConv2d, nn.Conv2d, torchs or computes_conv2d(conv), torchs)


def _take_conv3d(conv: nn.Conv3d) -> str | None:
    """`_fuse_convolution` of a Conv3d whose settings ours have."""
    cls = type(conv)
    if not kept_filters_3d.may_gain_3d(conv):
        return "torch's is as fast for such filters"
    own = cls._conv_forward is not nn.Conv3d._conv_forward
    if own or not (cls.forward is nn.Conv3d.forward or runs_conv3d(conv)):
        return f"{cls.__name__}: does not run Conv3d's forward"
    swap_class(conv, FusedConv3d)
    return None


def _fuse_linear(layer: nn.Module) -> str | None:
    """Fuse layer, if ours can serve it. Returns: why not, of a linear layer that is left."""
    if not isinstance(layer, nn.Linear) or isinstance(layer, FusedLinear):
        return None
    cls = type(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return f"{cls.__name__}: has no weight yet"
    if (reason := _why_untouched(layer)) is not None:
        return reason
    if not kept_linear.may_gain(layer):
        return "torch's is faster for so few channels"
    torchs = cls.forward is nn.Linear.forward
    return _swap(layer, FusedLinear, nn.Linear, torchs or computes_linear(layer), torchs)


def _swap(module, fused: type, base: type, same: bool, torchs: bool) -> str | None:
    """Make module a `fused`, where it computes the same as its base. Returns: why not.

    Args: torchs: its forward is the base's own, which no configuration changes.
    """
    of = None if torchs else configuration(module)
    if not same or (of is None and not torchs):
        return f"{type(module).__name__}: computes something else than a {base.__name__}"
    swap_class(module, fused)
    if not torchs:
        module.__dict__["configuration"] = of
    return None


def _why_untouched(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if isinstance(module, StandIn):
        return "it stands for another class already"
    if "parametrizations" in module._modules:
        return "is parametrized"
    return "has hooks" if hooked(module) else None


def _settings(conv: nn.Conv2d | nn.Conv3d) -> str:
    """Which of its settings ours do not have."""
    ones = (1,) * len(conv.kernel_size)
    others = {"groups": 1, "dilation": ones, "padding_mode": "zeros"}
    found = [
        f"{name} {getattr(conv, name)}" for name, of in others.items() if getattr(conv, name) != of
    ]
    return ", ".join(found or [f"padding {conv.padding!r}"])


def _fuse_block(module: nn.Module, references: Counter, known: dict) -> dict[nn.Module, str]:
    """Fuse the activations that module itself is known to apply after its norms: norm -> how."""
    if kinds := fuse_embedded_block(module, known):
        return kinds
    blocks = _diffusers_blocks()
    return blocks.fuse_pairs(module, references) if blocks else {}


def _fuse_sequential(sequential: nn.Sequential) -> dict[nn.Module, str]:
    children = [child for child in sequential if not passes(child)]
    pairs = [
        (norm, act)
        for norm, act in itertools.pairwise(children)
        if isinstance(norm, FusedGroupNorm)
        and norm.kind.act == "identity"
        and not hooked(norm)
        and found_act_of(act)
    ]
    cls = type(sequential)
    known = cls is nn.Sequential or issubclass(cls, PairedSequential)
    if not known or "forward" in sequential.__dict__:
        why = f"{cls.__name__} may run its children in its own way"
        return {norm: f"{ALONE}: {why}" for norm, _ in pairs}
    if pairs and cls is nn.Sequential:
        swap_class(sequential, FusedSequential)
    return {norm: pair_kind(act) for norm, act in pairs}


def _diffusers_blocks():
    """What is known of diffusers' classes; None, and nothing is imported, where none is loaded."""
    if "diffusers.models.upsampling" not in sys.modules:
        return None
    from . import diffusers_blocks

    return diffusers_blocks
