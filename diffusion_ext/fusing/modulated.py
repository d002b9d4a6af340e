"""Group norms whose scale and shift come from an embedding: adaptive normalisation.

    y = (1 + scale)·GroupNorm(x) + shift,  [scale, shift] = a linear layer of the embedding

Other people's classes differ in how they name the layer and how they are asked; what they compute
is found out by running them (see probing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.backend import recorded
from .modules import as_probed, fused_op
from .probing import NormKind, agrees, apart, configuration, random, twin_of
from .stand_in import StandIn, class_of, hooked, swap_class


def _of_linear(norm: nn.Module, emb: Tensor) -> Tensor:
    """diffusers' AdaGroupNorm."""
    return norm.linear(emb if norm.act is None else norm.act(emb))


def _of_mapper(norm: nn.Module, cond: dict[str, Tensor]) -> Tensor:
    """k-diffusion's AdaGN."""
    return norm.mapper(cond[norm.cond_key])


# How such norms are asked: the layer's name -> the rows [N, 2C] of scales and shifts, and what an
# embedding has to be wrapped in.
ROWS: dict[str, tuple[Callable, Callable[[nn.Module, Tensor], Any]]] = {
    "linear": (_of_linear, lambda norm, emb: emb),
    "mapper": (_of_mapper, lambda norm, emb: {norm.cond_key: emb}),
}


class FusedAdaptiveNorm(StandIn):
    """An adaptive group norm of images as one op; what is unusual is its own class's to do."""

    notes = ("layer", "configuration")
    kind, weight, bias = NormKind(), None, None

    def forward(self, x: Tensor, emb=None, *args, **kwargs) -> Tensor:
        usual = emb is not None and not (args or kwargs or recorded()) and x.dim() == 4
        if usual and as_probed(self):
            scale, shift = ROWS[self.layer][0](self, emb).chunk(2, dim=1)
            y = fused_op(self, x, "identity", scale=scale, shift=shift)
            if y is not None:
                return y
        return super().forward(x, *(() if emb is None else (emb,)), *args, **kwargs)


def fuse_adaptive_norm(norm: nn.Module) -> bool:
    """Whether norm is an adaptive group norm, which is fused then."""
    if isinstance(norm, FusedAdaptiveNorm):
        return not hooked(norm)
    own = norm._parameters or norm._buffers
    if own or hooked(norm) or not isinstance(vars(norm).get("num_groups"), int):
        return False
    layer = next((name for name in ROWS if class_of(norm._modules.get(name)) is nn.Linear), None)
    if layer is None or (of := configuration(norm)) is None or not _computes(norm, layer):
        return False
    swap_class(norm, FusedAdaptiveNorm)
    norm.__dict__.update(layer=layer, configuration=of)
    return True


def _computes(norm: nn.Module, layer: str) -> bool:
    rows, wrapped = ROWS[layer]
    linear = getattr(norm, layer)
    with apart():
        twin, channels = twin_of(norm), linear.out_features // 2
        x, emb = random(2, channels, 3, 4), random(2, linear.in_features)

        def formula(x: Tensor) -> Tensor:
            scale, shift = rows(twin, wrapped(twin, emb))[..., None, None].chunk(2, dim=1)
            return (1 + scale) * F.group_norm(x, twin.num_groups, eps=twin.eps) + shift

        # Of small numbers too, where eps counts.
        return agrees(twin, x, formula, 1e-3 * x, run=lambda x: twin(x, wrapped(twin, emb)))
