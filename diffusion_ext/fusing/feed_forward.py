"""Projections with their activation, or their gate: the first half of a transformer's feed-forward.

    y = act(proj(x)),  or  y = values · act(gates),  [values, gates] = proj(x)

diffusers' GELU, GEGLU, SwiGLU and LinearActivation are such, and others' of the same form. They are
known by the name of their layer, and by running them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.kept_linear import is_worth_it
from ..ops.reference import ACTIVATIONS
from .modules import FusedLinear, as_probed, projected_by
from .probing import agrees, apart, configuration, random, twin_of
from .stand_in import StandIn, hooked, swap_class

LAYER = "proj"
Form = tuple[str, bool]  # the activation, and whether it makes gates of one half


class FusedProjection(StandIn):
    """Such a projection as one pass over its outputs, wherever our linear layer serves."""

    notes = ("form", "configuration")

    def forward(self, *args, **kwargs) -> Tensor:  # [*, C] -> [*, K]
        layer = self._modules[LAYER]
        usual = len(args) == 1 and not kwargs and isinstance(layer, FusedLinear)
        # A glance first: to compare the configuration takes longer than a small layer.
        if usual and is_worth_it(layer, *args) and as_probed(self):
            act, gated = self.form
            if (y := projected_by(layer, *args, act=act, gated=gated)) is not None:
                return y
        return super().forward(*args, **kwargs)


def fuse_projection(module: nn.Module, known: dict[tuple, Form | None]) -> None:
    """Fuse module, if it is such a projection.

    Args: known: what projections of a kind compute, of those met before.
    """
    layer = module._modules.get(LAYER)
    if not isinstance(layer, FusedLinear) or isinstance(module, StandIn) or hooked(module):
        return
    own = module._parameters or module._buffers or len(module._modules) > 2
    if own or (of := configuration(module)) is None:
        return
    kind = type(module), of
    if kind not in known:
        known[kind] = _form_of(module)
    if known[kind] is not None:
        swap_class(module, FusedProjection)
        module.__dict__.update(form=known[kind], configuration=of)


def _form_of(module: nn.Module) -> Form | None:
    """What module computes of its layer's result; None where it is none of ours."""
    with apart():
        twin = twin_of(module)
        layer, before = twin._modules[LAYER], configuration(twin)
        layer.weight.mul_(0.1)  # large results would be linear, or zeros, by every activation
        x = random(2, layer.in_features) / layer.in_features**0.5
        for act, gated in itertools.product(ACTIVATIONS, (False, True)):

            def formula(x: Tensor, act=act, gated=gated) -> Tensor:
                y = F.linear(x, layer.weight, layer.bias)
                if not gated:
                    return ACTIVATIONS[act](y)
                values, gates = y.chunk(2, dim=-1)
                return values * ACTIVATIONS[act](gates)

            if layer.out_features % (1 + gated) == 0 and agrees(twin, x, formula, *_others(x)):
                same = _agrees_without_gradients(twin, x, formula)
                return (act, gated) if same and configuration(twin) == before else None
    return None


def _others(x: Tensor) -> tuple[Tensor, ...]:
    """Inputs that tell what x does not: more dimensions, results out of bounds that a module may
    set, and no number, which it may take out."""
    missing = x.clone()
    missing[0, 0] = torch.nan
    return x[None], x[:, None, None], 8 * x, 1e4 * x, missing


def _agrees_without_gradients(twin: nn.Module, x: Tensor, formula: Callable) -> bool:
    """A module may ask whether gradients are wanted; ours serve where they are not."""
    with torch.no_grad():
        return torch.allclose(twin(x), formula(x), rtol=1e-4, atol=1e-5)
