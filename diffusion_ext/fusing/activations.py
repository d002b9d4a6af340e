"""Which activation a module computes, and what lies between a norm and its activation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .probing import Configuration, activation_name, configuration
from .stand_in import StandIn, hooked

ALONE = "alone"  # in a report: a norm without an activation

# torch's activation classes -> their names in group_norm_act. nn.GELU, which has two, is in
# `act_of`.
ACTIVATION_NAMES: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu", nn.Mish: "mish"}
# Other people's classes -> (configuration, name) of what `fuse` has met.
CONFIGURED: dict[type, list[tuple[Configuration, str]]] = {}
PASSES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def act_of(module: nn.Module) -> str | None:
    """module's name among group_norm_act's activations; None if it computes none of them, or if the
    norm before it does so already."""
    cls = type(module)
    if cls is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if cls in ACTIVATION_NAMES:
        return None if "absorbed_by" in module.__dict__ else ACTIVATION_NAMES[cls]
    if cls not in CONFIGURED or module._parameters or module._buffers:
        return None
    compiling = torch.compiler.is_compiling()  # a module is not to be looked at then
    for of, name in CONFIGURED[cls]:
        if of.is_empty() if compiling else of.holds(module):
            return name
    return None


def found_act_of(module: nn.Module) -> str | None:
    """`act_of` module, which is run to find it out if it is of somebody's own class, and so known
    from now on."""
    cls, name = type(module), act_of(module)
    if name or cls.__module__.startswith("torch.nn.") or isinstance(module, StandIn):
        return name
    of = configuration(module)
    if of is None or (name := activation_name(module)) is None:
        return None
    CONFIGURED.setdefault(cls, []).append((of, name))
    return name


def passes(module: nn.Module) -> bool:
    """Whether module hands its input through, as it is now, and nobody watches it."""
    cls = type(module)
    idle = cls is nn.Identity or (cls in PASSES and (module.p == 0 or not module.training))
    return idle and not (hooked(module) or _has_any_global_hook())


def pair_kind(activation: nn.Module) -> str:
    """How a report calls a norm that is followed by activation."""
    name = type(activation).__name__
    return f"{ALONE}: the {name} after it has hooks" if hooked(activation) else f"with {name}"
