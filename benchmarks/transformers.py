"""Blocks of diffusion transformers, as diffusers has them, each family's with its own widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Transformer:
    """Blocks of a family, of random weights: x [B, T, D], and what else they read, to [B, T, D].

    Attributes:
        name: what it is. input: x's shape. others: the shapes of the other inputs.
        build: makes the module, whose forward takes x and the others.
    """

    name: str
    input: tuple[int, ...]
    build: Callable[[], nn.Module]
    others: tuple[tuple[int, ...], ...] = ()
    layout: str = "contiguous"
    apart: bool = False

    def module(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    @property
    def bytes(self) -> int:
        """Of its weights, none of which is made."""
        with torch.device("meta"):
            return sum(p.nbytes for p in self.module().parameters())

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x, *(torch.randn(shape, device=x.device) for shape in self.others))


class CrossAttention(nn.Module):
    """Stable Diffusion 1.5's block: x [B, T, 320], text [B, N, 768]."""

    def __init__(self, width: int, heads: int, text: int):
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.block = BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=text)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.block(x, encoder_hidden_states=text)


class DiT(nn.Module):
    """Blocks of DiT (Peebles & Xie 2023), at one timestep and of one class."""

    def __init__(self, width: int, heads: int, count: int):
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                width,
                heads,
                width // heads,
                activation_fn="gelu-approximate",
                attention_bias=True,
                norm_type="ada_norm_zero",
                num_embeds_ada_norm=1000,
                norm_elementwise_affine=False,
            )
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        t = torch.full((x.shape[0],), 500, device=x.device)
        for block in self.blocks:
            x = block(x, timestep=t, class_labels=t)
        return x


class Flux(nn.Module):
    """A double and two single blocks: x [B, T, D], text [B, N, D], embedding [B, D]."""

    def __init__(self, heads: int, size: int, tokens: int):
        super().__init__()
        from diffusers.models.transformers import transformer_flux as flux

        width = heads * size
        self.joint = flux.FluxTransformerBlock(width, heads, size)
        self.singles = nn.ModuleList(
            flux.FluxSingleTransformerBlock(width, heads, size) for _ in range(2)
        )
        self.register_buffer("cos", torch.rand(tokens, size))
        self.register_buffer("sin", torch.rand(tokens, size))

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        rotary = self.cos, self.sin
        text, x = self.joint(x, text, embedding, rotary)
        for block in self.singles:
            text, x = block(x, text, embedding, rotary)
        return x


class StableDiffusion3(nn.Module):
    """Joint blocks (Esser et al. 2024): x [B, T, D], text [B, N, D], embedding [B, D]."""

    def __init__(self, heads: int, size: int, count: int):
        super().__init__()
        from diffusers.models.attention import JointTransformerBlock

        self.blocks = nn.ModuleList(
            JointTransformerBlock(heads * size, heads, size) for _ in range(count)
        )

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            text, x = block(x, text, embedding)
        return x


class Wan(nn.Module):
    """Wan's blocks: x [B, T, D], text [B, N, D], embedding [B, 6, D]."""

    def __init__(self, heads: int, size: int, count: int, tokens: int):
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        width = heads * size
        self.blocks = nn.ModuleList(
            WanTransformerBlock(width, 4 * width, heads, cross_attn_norm=True) for _ in range(count)
        )
        self.register_buffer("cos", torch.rand(1, tokens, 1, size))
        self.register_buffer("sin", torch.rand(1, tokens, 1, size))

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, embedding, (self.cos, self.sin))
        return x


WHOLE = (
    Transformer(
        "Stable Diffusion 1.5's transformer block",
        (2, 4096, 320),
        lambda: CrossAttention(320, 8, 768),
        ((2, 77, 768),),
    ),
    Transformer("DiT-XL/2, 2 blocks", (2, 256, 1152), lambda: DiT(1152, 16, 2)),
    Transformer(
        "Flux, 3 blocks",
        (1, 1024, 1024),
        lambda: Flux(8, 128, 1280),
        ((1, 256, 1024), (1, 1024)),
    ),
    Transformer(
        "Stable Diffusion 3, 2 blocks",
        (1, 1024, 512),
        lambda: StableDiffusion3(8, 64, 2),
        ((1, 154, 512), (1, 512)),
    ),
    Transformer(
        "Wan, 2 blocks",
        (1, 1280, 1024),
        lambda: Wan(8, 128, 2, 1280),
        ((1, 77, 1024), (1, 6, 1024)),
    ),
)
QUICK = (
    Transformer(
        "Stable Diffusion 1.5's transformer block",
        (2, 16, 32),
        lambda: CrossAttention(32, 4, 16),
        ((2, 5, 16),),
    ),
    Transformer("DiT-XL/2, 2 blocks", (2, 16, 32), lambda: DiT(32, 4, 1)),
    Transformer("Flux, 3 blocks", (1, 16, 32), lambda: Flux(2, 16, 20), ((1, 4, 32), (1, 32))),
    Transformer(
        "Stable Diffusion 3, 2 blocks",
        (1, 16, 32),
        lambda: StableDiffusion3(2, 16, 1),
        ((1, 4, 32), (1, 32)),
    ),
    Transformer("Wan, 2 blocks", (1, 16, 32), lambda: Wan(2, 16, 1, 16), ((1, 4, 32), (1, 6, 32))),
)
