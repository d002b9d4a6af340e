"""What `fuse` knows of diffusers: ResnetBlock2D, Upsample2D, the output norms of UNets and VAEs.

Imported only where a model of diffusers' is loaded already.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from ..ops.backend import recorded
from .activations import ALONE, found_act_of, pair_kind
from .modules import AbsorbedActivation, FusedGroupNorm, absorb, convolved_by, norm_act
from .stand_in import StandIn, hooked, swap_class

# Whose forward ends in conv_norm_out, conv_act, conv_out, and uses conv_act for nothing else.
OUTPUT_NORMS = {
    "diffusers.models.unets.unet_2d.UNet2DModel",
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "diffusers.models.unets.unet_3d_condition.UNet3DConditionModel",
    "diffusers.models.unets.unet_motion_model.UNetMotionModel",
    "diffusers.models.unets.unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel",
    "diffusers.models.autoencoders.vae.Encoder",
    "diffusers.models.autoencoders.vae.Decoder",
    "diffusers.models.autoencoders.vae.MaskConditionDecoder",
    "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder.TemporalDecoder",
}


class FusedResnetBlock2D(StandIn, ResnetBlock2D):
    """ResnetBlock2D with each norm, its embedding and its activation as one op."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        """As ResnetBlock2D's, which serves whatever is unusual, and raises its own errors."""
        if args or kwargs or recorded() or not self._usual(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        return self.fused_forward(input_tensor, temb)

    def _usual(self, x: Tensor, temb: Tensor | None) -> bool:
        if x.dim() != 4:
            return False
        if self.time_emb_proj is None:
            return temb is None and self.time_embedding_norm != "scale_shift"
        embedded = self.time_embedding_norm in ("default", "scale_shift")
        return (
            embedded and temb is not None and temb.dim() == 2 and temb.shape[0] in (1, x.shape[0])
        )

    def fused_forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """x [N, C, H, W], temb [N or 1, T] or None -> [N, out, H', W']"""
        h = norm_act(self.norm1, self.nonlinearity, x, rounded_after=True)
        if self.upsample is not None:
            if x.shape[0] >= 64:  # diffusers' way round a fault of channels_last upsampling
                x, h = x.contiguous(), h.contiguous()
            x, h = self.upsample(x), self.upsample(h)
        elif self.downsample is not None:
            x, h = self.downsample(x), self.downsample(h)
        h = self.conv1(h)
        modulation = self._modulation(temb)
        h = norm_act(self.norm2, self.nonlinearity, h, **modulation, rounded_after=True)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        h, divisor = self.dropout(h), self.output_scale_factor
        y = convolved_by(self.conv2, h, residual=x, scale=1 / divisor)
        return (x + self.conv2(h)) / divisor if y is None else y

    def _modulation(self, temb: Tensor | None) -> dict[str, Tensor]:
        if self.time_emb_proj is None:
            return {}
        rows = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            return {"pre_shift": rows}
        scale, shift = rows.chunk(2, dim=1)
        return {"scale": scale, "shift": shift}


class FusedUpsample2D(StandIn, Upsample2D):
    """Upsample2D whose convolution reads the smaller images: the larger ones are not made."""

    def forward(self, hidden_states: Tensor, output_size=None, *args, **kwargs) -> Tensor:
        """As Upsample2D's, which serves whatever is unusual."""
        if output_size is None and not (args or kwargs or recorded()):
            conv = self.conv if self.name == "conv" else self.Conv2d_0
            if hidden_states.shape[0] >= 64:  # as diffusers does, whose result lies accordingly
                hidden_states = hidden_states.contiguous()
            if (y := convolved_by(conv, hidden_states, repeat=2)) is not None:
                return y
        return super().forward(hidden_states, output_size, *args, **kwargs)


def fuse_upsampling(module: nn.Module) -> None:
    """Let module, if it is an Upsample2D that only repeats pixels and convolves, read in place."""
    if type(module) is Upsample2D and not hooked(module):
        plain = module.use_conv and not module.use_conv_transpose and module.interpolate
        if plain and module.norm is None and upsampling_is_known():
            swap_class(module, FusedUpsample2D)


@functools.cache
def upsampling_is_known() -> bool:
    """Whether the installed Upsample2D repeats pixels and convolves."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        upsample = Upsample2D(2, use_conv=True, out_channels=3).double()
        x = torch.randn(1, 2, 2, 3, dtype=torch.float64)
        repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return torch.allclose(upsample(x), upsample.conv(repeated))


def fuse_pairs(module: nn.Module, references: Counter) -> dict[nn.Module, str]:
    """Fuse the activations that module, if it is known, applies after its norms: norm -> how.

    Args: references: how many places of the model each module stands in.
    """
    if type(module) is ResnetBlock2D or isinstance(module, FusedResnetBlock2D):
        return _fuse_resnet(module)
    if _forward_of(type(module)) in OUTPUT_NORMS and "forward" not in module.__dict__:
        return _fuse_output(module, references)
    return {}


def _fuse_resnet(block: ResnetBlock2D) -> dict[nn.Module, str]:
    norms = [n for n in (block.norm1, block.norm2) if isinstance(n, FusedGroupNorm)]
    norms = [n for n in norms if not hooked(n) and n.kind.act == "identity"]
    if (reason := _reason_not_to_pair(block)) is not None:
        return dict.fromkeys(norms, f"{ALONE}: {reason}")
    if norms and type(block) is ResnetBlock2D:
        swap_class(block, FusedResnetBlock2D)
    kinds = dict.fromkeys(norms, f"{pair_kind(block.nonlinearity)}, ResnetBlock2D")
    if block.norm2 in kinds and block.time_emb_proj is not None:
        how = {"default": "shift", "scale_shift": "scale and shift"}[block.time_embedding_norm]
        kinds[block.norm2] += f", time embedding as {how}"
    return kinds


def _reason_not_to_pair(block: ResnetBlock2D) -> str | None:
    if "forward" in block.__dict__:
        return "the block's forward is replaced on the instance"
    if found_act_of(block.nonlinearity) is None:
        return f"no kernel has a {type(block.nonlinearity).__name__}"
    if hooked(block.nonlinearity):
        return f"the {type(block.nonlinearity).__name__} after it has hooks"
    if not forward_is_known():
        return "this version's ResnetBlock2D computes something else"
    return None


def _fuse_output(module: nn.Module, references: Counter) -> dict[nn.Module, str]:
    norm, act = module.conv_norm_out, module.conv_act
    if not isinstance(norm, FusedGroupNorm) or hooked(norm) or norm.kind.act != "identity":
        return {}
    if isinstance(act, AbsorbedActivation) and act.absorbed_by == (norm,):
        return {norm: f"with {act.extra_repr()}, output"}
    if references[norm] > 1 or references[act] > 1:
        return {norm: f"{ALONE}: it or the activation after it serves elsewhere too"}
    if found_act_of(act) is None:
        return {norm: f"{ALONE}: no kernel has a {type(act).__name__}"}
    kind = pair_kind(act)
    if not hooked(act):
        absorb(norm, act)
    return {norm: f"{kind}, output"}


def _forward_of(cls: type) -> str:
    """The class that forward of cls is written in."""
    owner = next((c for c in cls.__mro__ if "forward" in vars(c)), nn.Module)
    return f"{owner.__module__}.{owner.__qualname__}"


@functools.cache
def forward_is_known() -> bool:
    """Whether the installed ResnetBlock2D computes what `fused_forward` does.

    Another version of diffusers may not. Each kind of block is run both ways, tiny and in float64.
    """
    norms, directions = ("default", "scale_shift", None), ("", "up", "down")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        return all(itertools.starmap(_agrees, itertools.product(norms, directions)))


def _agrees(time_norm: str | None, direction: str) -> bool:
    block = ResnetBlock2D(
        in_channels=2,
        out_channels=4,
        temb_channels=3 if time_norm else None,
        groups=1,
        groups_out=2,
        time_embedding_norm=time_norm or "default",
        output_scale_factor=1.5,
        up=direction == "up",
        down=direction == "down",
    )
    block.double().eval()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    temb = torch.randn(2, 3, dtype=torch.float64) if time_norm else None
    expected = block(x, temb)
    swap_class(block, FusedResnetBlock2D)
    return torch.allclose(block.fused_forward(x, temb), expected)
