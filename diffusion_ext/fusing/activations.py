"""Which activation a module computes, and what lies between a norm and its activation."""

from __future__ import annotations

import torch
from torch import nn

from .probing import Configuration, activation_name, configuration
from .stand_in import StandIn, hooked

ALONE = "alone"  # in a report: a norm without an activation

# Activation class -> its name in group_norm_act. nn.GELU, which has two, is in `act_of`; `fuse`
# adds what it finds of other people's classes, with the configuration that it found it of.
ACTIVATION_NAMES: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Mish: "mish"}
CONFIGURED: dict[type, list[tuple[Configuration, str]]] = {}
PASSES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def act_of(module: nn.Module) -> str | None:
    """module's name among group_norm_act's activations; None if it is not one of them, or not one
    of its own any more."""
    if "absorbed_by" in module.__dict__:
        return None
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    cls = type(module)
    if cls in ACTIVATION_NAMES or torch.compiler.is_compiling():
        return ACTIVATION_NAMES.get(cls)
    return next((name for of, name in CONFIGURED.get(cls, ()) if of.holds(module)), None)


def found_act_of(module: nn.Module) -> str | None:
    """`act_of` module, which is run to find it out if it is of somebody's own class, and so known
    from now on."""
    cls = type(module)
    name = act_of(module)
    if name or cls.__module__.startswith("torch.nn.") or isinstance(module, StandIn):
        return name
    of = configuration(module)
    if of is None or (name := activation_name(module)) is None:
        return None
    if of.is_empty():
        ACTIVATION_NAMES[cls] = name
    else:
        CONFIGURED.setdefault(cls, []).append((of, name))
    return name


def passes(module: nn.Module) -> bool:
    """Whether module hands its input through, as it is now."""
    if isinstance(module, nn.Identity):
        return type(module) is nn.Identity and not hooked(module)
    idle = type(module) in PASSES and (module.p == 0 or not module.training)
    return idle and not hooked(module)


def pair_kind(activation: nn.Module) -> str:
    """How a report calls a norm that is followed by activation."""
    name = type(activation).__name__
    return f"{ALONE}: the {name} after it has hooks" if hooked(activation) else f"with {name}"
