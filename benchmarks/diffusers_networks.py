"""Forwards of diffusers' networks: fused in place, beside what people run them with instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffusion_ext as dx
from diffusion_ext.sampling.exports import exported

from .networks import FORWARD, built, tolerance, twice_compiled
from .peers import peers
from .transformers import Transformer
from .work import Case, Implementation, Work, compile_anew, copy_of_x

TIMESTEP = 500


@dataclass(frozen=True)
class DiffusersNetwork:
    """A network of diffusers, of random weights.

    Attributes:
        name: what it is. input: shape of its images or latents. channels: block_out_channels.
        attention: the levels that have it, from the uppermost, 0, on.
        text: [tokens, width] of the prompt that it reads on all levels but the lowest.
        apart: it is too large to be there more than twice.
    """

    name: str
    input: tuple[int, ...]
    channels: tuple[int, ...]
    attention: tuple[int, ...] = ()
    text: tuple[int, int] | None = None
    apart: bool = False
    layout = "channels_last"

    def module(self) -> nn.Module:
        """Of x and, where it reads one, a prompt [B, *text]; it gives one tensor."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.text:
                return ConditionedUnet(self)
            return Decoder(self.channels) if self.name == "AutoencoderKL" else Unet(self)

    @property
    def bytes(self) -> int:
        """Of its weights, none of which is made."""
        with torch.device("meta"):
            return sum(p.nbytes for p in self.module().parameters())

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, torch.randn(len(x), *self.text, device=x.device)) if self.text else (x,)


class Unet(nn.Module):
    """A UNet2DModel at one timestep: x [B, 3, H, H] to [B, 3, H, H]."""

    def __init__(self, network: DiffusersNetwork):
        super().__init__()
        from diffusers import UNet2DModel

        levels = len(network.channels)
        down, up = ["DownBlock2D"] * levels, ["UpBlock2D"] * levels
        for level in network.attention:
            down[level], up[levels - 1 - level] = "AttnDownBlock2D", "AttnUpBlock2D"
        self.unet = UNet2DModel(
            sample_size=network.input[-1],
            block_out_channels=network.channels,
            down_block_types=down,
            up_block_types=up,
            norm_num_groups=min(32, network.channels[0]),
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.full((x.shape[0],), TIMESTEP, device=x.device)
        return self.unet(x, t, return_dict=False)[0]


class ConditionedUnet(nn.Module):
    """A UNet2DConditionModel at one timestep: x [B, 4, h, h], text [B, N, D] to [B, 4, h, h]."""

    def __init__(self, network: DiffusersNetwork):
        super().__init__()
        from diffusers import UNet2DConditionModel

        above = len(network.channels) - 1
        self.unet = UNet2DConditionModel(
            sample_size=network.input[-1],
            block_out_channels=network.channels,
            down_block_types=["CrossAttnDownBlock2D"] * above + ["DownBlock2D"],
            up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * above,
            cross_attention_dim=network.text[-1],
            norm_num_groups=min(32, network.channels[0]),
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        t = torch.full((x.shape[0],), TIMESTEP, device=x.device)
        return self.unet(x, t, text, return_dict=False)[0]


class Decoder(nn.Module):
    """An AutoencoderKL's decoder of Stable Diffusion 1.5's shape: [B, 4, h, h] to [B, 3, 8h, 8h]"""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        from diffusers import AutoencoderKL

        levels = len(channels)
        self.autoencoder = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=min(32, channels[0]),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z, return_dict=False)[0]


WHOLE = (
    DiffusersNetwork("UNet2DModel", (4, 3, 32, 32), (64, 128, 128, 256)),
    DiffusersNetwork(
        "UNet2DModel with attention", (1, 3, 64, 64), (128, 128, 256, 256, 512, 512), (4,)
    ),
    DiffusersNetwork(
        "UNet2DModel with attention on three levels",
        (1, 3, 32, 32),
        (64, 128, 128, 256),
        (1, 2, 3),
    ),
    DiffusersNetwork("AutoencoderKL", (1, 4, 16, 16), (128, 256, 512, 512)),
    # Stable Diffusion 1.5 at 512 pixels, one picture with guidance: 3.4 GB of weights.
    DiffusersNetwork(
        "UNet2DConditionModel",
        (2, 4, 64, 64),
        (320, 640, 1280, 1280),
        text=(77, 768),
        apart=True,
    ),
)
QUICK = (
    DiffusersNetwork("UNet2DModel with attention", (2, 3, 16, 16), (16, 32, 32), (1,)),
    DiffusersNetwork("AutoencoderKL", (1, 4, 4, 4), (16, 32)),
    DiffusersNetwork("UNet2DConditionModel", (2, 4, 4, 4), (16, 32), text=(3, 8)),
)


Network = DiffusersNetwork | Transformer


def forwards(networks: tuple[Network, ...], device: str) -> list[Work]:
    """None where diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return []
    return [_forward(network, device) for network in networks]


def _forward(network: Network, device: str) -> Work:
    case = Case(network.input, layout=network.layout, device=device)

    def module(dtype=torch.float32) -> nn.Module:
        return network.module().eval().to(device, dtype)

    def fused() -> nn.Module:
        model = module().to(memory_format=torch.channels_last)
        dx.fuse(model)
        return model

    of = {"factor": tolerance(FORWARD, device)}
    rows = {"copy": copy_of_x(), "eager": built(module, around=torch.no_grad, **of)}
    rows |= twice_compiled(lambda: compile_anew(module()), **of)
    rows |= peers(module, device, **of)
    rows["ours"] = built(fused, around=torch.no_grad, **of)
    rows["ours, traced"] = Implementation(
        lambda *inputs: exported("trace", fused(), inputs), around=torch.no_grad, **of
    )
    return Work(
        op=network.name,
        variant="forward",
        case=case,
        inputs=lambda: network.inputs(case.draw()),
        implementations=rows,
        exact=_exact(module),
        passes=2,
        weights=network.bytes,
        apart=network.apart,
    )


def _exact(module: Callable[..., nn.Module]) -> Callable:
    def exact(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return module(torch.float64)(*inputs)

    return exact
