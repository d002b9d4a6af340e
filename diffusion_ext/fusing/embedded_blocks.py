"""Residual blocks in the manner of OpenAI's guided-diffusion, which many networks have taken over.

    h = in_layers(x);  e = emb_layers(emb)
    h = out_layers(h + e), or with scale and shift  rest((1 + scale)·norm(h) + shift)
    y = skip_connection(x) + h

They are known by these names, and by running them; the class and what it is called do not matter.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..ops.backend import recorded
from .activations import ALONE, found_act_of, pair_kind
from .modules import FusedGroupNorm, as_probed, convolved_by, norm_act
from .probing import agrees, apart, configuration, random, twin_of
from .stand_in import StandIn, class_of, hooked, swap_class

SEQUENTIALS = ("in_layers", "emb_layers", "out_layers")


class FusedEmbeddedBlock(StandIn):
    """Such a block, with the second norm, its embedding and its activation as one op."""

    notes = ("configuration",)

    def forward(self, x: Tensor, emb: Tensor | None = None, *args, **kwargs) -> Tensor:
        """As the block's own forward, which serves whatever is unusual."""
        recomputed = torch.is_grad_enabled() and getattr(self, "use_checkpoint", False)
        usual = isinstance(emb, Tensor) and not (args or kwargs or recomputed or recorded())
        if usual and as_probed(self) and emb.dim() == 2 and emb.shape[0] in (1, x.shape[0]):
            return self.fused_forward(x, emb)
        return super().forward(x, *(() if emb is None else (emb,)), *args, **kwargs)

    def fused_forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, *spatial], emb [N or 1, E] -> [N, K, *spatial']"""
        if getattr(self, "updown", False):
            h = self.h_upd(self.in_layers[:-1](x))
            h, x = self.in_layers[-1](h), self.x_upd(x)
        else:
            h = self.in_layers(x)
        norm, act, *others, conv = self.out_layers
        rows = self.emb_layers(emb).type(h.dtype)
        h = norm_act(norm, act, h, **_modulation(self, rows))
        for layer in others:
            h = layer(h)
        skip = self.skip_connection(x)
        y = convolved_by(conv, h, residual=skip)
        return skip + conv(h) if y is None else y


def _modulation(block: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    if not block.use_scale_shift_norm:
        return {"pre_shift": rows}
    scale, shift = rows.chunk(2, dim=1)
    return {"scale": scale, "shift": shift}


def fuse_embedded_block(block: nn.Module, known: dict[tuple, bool]) -> dict[nn.Module, str]:
    """Fuse block, if it is such a one: its second norm -> how.

    Args: known: whether blocks of a kind compute what they should, of those met before.
    """
    if not _looks_like_one(block):
        return {}
    norm, act = block.out_layers[:2]
    if not isinstance(norm, FusedGroupNorm) or hooked(norm):
        return {}
    if isinstance(block, FusedEmbeddedBlock):
        return {norm: _how(block, act)}
    of = configuration(block, with_children=False)
    kind = type(block), of, tuple((name, type(m)) for name, m in block.named_modules())
    own = block._parameters or block._buffers
    fits = of is not None and not (own or hooked(block)) and found_act_of(act) is not None
    if fits and kind not in known:
        known[kind] = _computes(block)
    if not fits or not known[kind]:
        taken_out = f"{ALONE}: its block takes it out of its Sequential"
        return {norm: taken_out} if block.use_scale_shift_norm else {}
    swap_class(block, FusedEmbeddedBlock)
    block.__dict__["configuration"] = of
    return {norm: _how(block, act)}


def _how(block: nn.Module, act: nn.Module) -> str:
    embedding = "scale and shift" if block.use_scale_shift_norm else "shift"
    return f"{pair_kind(act)}, embedding as {embedding}"


def _looks_like_one(block: nn.Module) -> bool:
    children = block._modules
    if not all(isinstance(children.get(name), nn.Sequential) for name in SEQUENTIALS):
        return False
    if "use_scale_shift_norm" not in vars(block) or children.get("skip_connection") is None:
        return False
    linear = [m for m in block.emb_layers if class_of(m) is nn.Linear]
    return len(linear) == 1 and len(block.out_layers) >= 3


def _computes(block: nn.Module) -> bool:
    """Whether block computes what `fused_forward` does: run both ways, to rounding."""
    (linear,) = (m for m in block.emb_layers if class_of(m) is nn.Linear)
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    conv = next((m for m in block.in_layers if isinstance(m, convolutions)), None)
    if conv is None:
        return False
    with apart():
        twin = twin_of(block)
        x = random(2, conv.in_channels, *[4] * (conv.weight.dim() - 2))
        emb = random(2, linear.in_features)
        fused = partial(FusedEmbeddedBlock.fused_forward, twin, emb=emb)
        return agrees(twin, x, fused, run=lambda x: twin(x, emb))
