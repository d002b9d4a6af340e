"""fuse(model): a model's GroupNorms, with the activations after them, and its convolutions on our
ops."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..nn.group_norm_act import GroupNormAct
from ..nn.packed_conv2d import filter_bytes, forget, packs
from ..nn.winograd_conv2d import WinogradConv2d
from .known_forwards import is_float32_norm, is_swish
from .modules import (
    ACTIVATION_NAMES,
    ALONE,
    FusedConv2d,
    FusedGroupNorm,
    FusedGroupNorm32,
    FusedSequential,
    PairedSequential,
    act_of,
    hooked,
    pair_kind,
)
from .stand_in import restore_class, swap_class


@dataclass
class FuseReport:
    """What `fuse` did: (module name, how) for each norm that is fused, (name, why) for the rest,
    the names of the convolutions, and the bytes that their filters take beside the weights once
    they are laid out, on a CPU in float32 without gradients."""

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    filter_bytes: int = 0

    def __str__(self) -> str:
        names = [name for name, _ in self.fused + self.left]
        width = max(map(len, names), default=0)
        lines = [f"{len(self.fused)} fused, {len(self.left)} left as they were"]
        lines += [f"  fused  {name:{width}}  {how}" for name, how in self.fused]
        lines += [f"  left   {name:{width}}  {why}" for name, why in self.left]
        if self.convolutions:
            lines.append(
                f"{len(self.convolutions)} convolutions of ours, on channels_last; to sample, "
                f"their filters take {self.filter_bytes / 2**20:.3g} MiB more at the most"
            )
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Make a model faster, in place: its GroupNorms, the activations after them, its convolutions.

    Norms: an activation is fused with its norm where the structure proves that it follows it:
    neighbours in an nn.Sequential, diffusers' ResnetBlock2D (with its time embedding) and the
    output norms of diffusers' UNets and autoencoders. Every other GroupNorm is fused alone.

    Convolutions: on a CPU, in float32 and channels_last; so move the model and the images to that.
    Without gradients, weights are laid out once, in memory of their own (see `FuseReport`), and
    again when they change. With gradients, 3x3 filters of stride 1 and padding 1 run by Winograd's
    algorithm.

    Parameters, module names, the state dict and the module objects stay; only their classes change.
    A new class stands in for the old one (see stand_in.py), so that adapters and other wrappers
    find what they look for. Modules with hooks, and subclasses with a forward of their own, are
    left as they are. Where no kernel serves an input (float64, another device), a fused module
    computes as before. Fuse before torch.compile. A pickle of the model needs diffusion_ext.

    Returns: FuseReport of every GroupNorm in model; print it. Fusing again changes nothing.
    Raises: TypeError unless model is a torch.nn.Module.
    """
    _check(model)
    report = FuseReport()
    kinds: dict[nn.Module, str] = {}  # fused norm -> how
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and _reason_to_leave(module) is None:
            _fuse_norm(module)
            kinds[module] = ALONE
        elif is_swish(type(module)):
            ACTIVATION_NAMES[type(module)] = "silu"
    references = Counter(child for m in model.modules() for child in m._modules.values())
    for module in model.modules():
        kinds.update(_fuse_pairs(module, references))

    blocks = _diffusers_blocks()
    for name, module in model.named_modules():
        if blocks:
            blocks.fuse_upsampling(module)
        if type(module) is nn.Conv2d and packs(module) and not hooked(module):
            swap_class(module, FusedConv2d)
        if isinstance(module, WinogradConv2d):
            report.convolutions.append(name or "(model)")
            report.filter_bytes += filter_bytes(module)
        if module in kinds:
            report.fused.append((name or "(model)", kinds[module]))
        elif (reason := _reason_to_leave(module)) is not None:
            report.left.append((name or "(model)", reason))
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
        raise TypeError(f"model: wanted a torch.nn.Module, got {type(model).__name__}")


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why module, if it normalises groups, stays as it is; None where it can be fused or is not."""
    if isinstance(module, GroupNormAct):
        return "GroupNormAct: on the fused op already"
    if not isinstance(module, nn.GroupNorm):
        return _other_norms().get(type(module))
    cls = type(module)
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if hooked(module):
        return "has hooks"
    known = cls is nn.GroupNorm or issubclass(cls, FusedGroupNorm) or is_float32_norm(cls)
    if not known:
        return f"{cls.__name__}: a subclass of GroupNorm that is not known"
    if not module.eps > 0:
        return f"eps is {module.eps}"
    return None


def _fuse_norm(norm: nn.GroupNorm) -> None:
    if not isinstance(norm, FusedGroupNorm):
        swap_class(norm, FusedGroupNorm if type(norm) is nn.GroupNorm else FusedGroupNorm32)


def _fuse_pairs(module: nn.Module, references: Counter) -> dict[nn.Module, str]:
    """Fuse the activations that module itself is known to apply after its norms: norm -> how."""
    if isinstance(module, nn.Sequential):
        return _fuse_sequential(module)
    blocks = _diffusers_blocks()
    return blocks.fuse_pairs(module, references) if blocks else {}


def _fuse_sequential(sequential: nn.Sequential) -> dict[nn.Module, str]:
    children = list(sequential)
    pairs = [
        (norm, act)
        for norm, act in itertools.pairwise(children)
        if isinstance(norm, FusedGroupNorm) and not hooked(norm) and act_of(act)
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


def _other_norms() -> dict[type, str]:
    blocks = _diffusers_blocks()
    return blocks.OTHER_NORMS if blocks else {}
