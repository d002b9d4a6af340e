"""Pure-torch definitions of every op: any device, any floating dtype, differentiable.

They are the specification that the kernels are tested against, and the fallback where no kernel
serves. Half precision is computed in float32 and rounded once at the end, as the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layouts import in_layout, layout_of_norm
from .row_shape import RowShape
from .wide import wide

ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "mish": F.mish,
}

# What perturb writes beside x_t, as the kernels number it.
LEARNED = {None: 0, "noise": 1, "v": 2}

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def _wide(x: Tensor) -> Tensor:
    """x in the dtype its arithmetic runs in: float32 for the half types."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """values [B] (or []) shaped to broadcast over x [B,*]."""
    return values.reshape(values.shape + (1,) * (x.dim() - 1)) if values.dim() else values


def _take(table: Tensor, index: Tensor) -> Tensor:
    """table[index], with the index [] or [B] left on its device: table[index []] would read it."""
    return table[index.reshape(-1)].reshape(index.shape + table.shape[1:])


# --- philox_normal ------------------------------------------------------------------------------


def philox4x32(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): 4 counter words and 2 key words to 4 random words.

    Every word is an int64 tensor of values in [0, 2^32); the tensors broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_PHILOX_M[0], c0)
        hi1, lo1 = _mul_hi_lo(_PHILOX_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _PHILOX_W[0]) & _MASK32, (k1 + _PHILOX_W[1]) & _MASK32
    return [c0, c1, c2, c3]


def _mul_hi_lo(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of m·x, by 16-bit halves so that int64 does not overflow."""
    low = m * (x & 0xFFFF)
    mid = m * (x >> 16) + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_normal(
    seeds: Tensor, shape: tuple[int, ...], step: int | Tensor, stream: int, dtype: torch.dtype
) -> Tensor:
    """Normals by counter: element e of a sample depends on its seed, step, stream and e alone.

    Args: seeds: [B] int64. shape: (B, *). step: an int, or int64 [B] for one per sample.
    """
    count = math.prod(shape[1:])
    block = torch.arange((count + 3) // 4, device=seeds.device)
    step = torch.as_tensor(step, device=seeds.device)
    step = (step.reshape(-1, 1) if step.dim() else step) & _MASK32  # [B, 1] or []
    seeds = seeds.reshape(-1, 1)
    words = philox4x32(
        [block & _MASK32, block >> 32, step, torch.full_like(step, stream & _MASK32)],
        [seeds & _MASK32, (seeds >> 32) & _MASK32],
    )  # 4 x [B, blocks]
    # Box-Muller: words (0, 1) give elements 0 and 1 of the block, words (2, 3) elements 2 and 3.
    z = []
    for r0, r1 in (words[:2], words[2:]):
        u = (wide(r0) + 0.5) * 2.0**-32
        radius, angle = torch.sqrt(-2 * torch.log(u)), (2 * math.pi * 2.0**-32) * wide(r1)
        z += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(z, dim=-1).flatten(1)[:, :count].reshape(shape).to(seeds.device, dtype)


# --- sampler_step and perturb -------------------------------------------------------------------


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    timesteps: Tensor,
    row: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    history: Tensor | None = None,
    clip: float | None = None,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(x', x0) [B,*] of a row of a table; `diffusion_ext.sampler_step` states the formula."""
    slots = None if history is None else history[None]
    table = coefficients, timesteps, row
    return sampler_step_with_slots(x, model_output, *table, noise, seeds, slots, clip, guidance)[:2]


def sampler_step_with_slots(
    x, model_output, coefficients, timesteps, row, noise, seeds, slots, clip, guidance
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x', x0) and the slots [S,B,*] after the step. Args: as `sampler_step`; slots: or None."""
    remembered = () if slots is None else slots.unbind()
    table = coefficients, timesteps, row
    out, x0, *written = sampler_step_from_slots(
        x, model_output, *table, noise, seeds, remembered, clip, guidance
    )
    if slots is None:
        return out, x0, None
    shape = RowShape.of(coefficients.shape[1], len(remembered))
    if shape.keeps_x0:
        return out, x0, x0[None]
    c = _take(coefficients, row)
    for write, value in enumerate(written):
        slot = _per_sample(c[..., shape.slot(write)], x)
        slots = torch.stack([torch.where(slot == j, value, s) for j, s in enumerate(slots)])
    return out, x0, slots


def sampler_step_from_slots(
    x, model_output, coefficients, timesteps, row, noise, seeds, slots, clip, guidance
) -> tuple[Tensor, ...]:
    """(x', x0) and what the row writes, each [B,*]. Args: as `sampler_step`; slots: S of [B,*]."""
    dtype, x, m = x.dtype, _wide(x), _wide(model_output)
    remembered = [_wide(slot) for slot in slots]
    shape = RowShape.of(coefficients.shape[1], max(len(remembered), 1))
    c = _take(coefficients.to(x.dtype), row)  # [columns] or [B, columns]
    columns = [_per_sample(column, x) for column in c.unbind(-1)]
    if m.shape[0] != x.shape[0]:
        m = _guided(*m.chunk(2), columns[-1] if shape.guided else guidance)
    kx, km = columns[:2]
    x0 = kx * x + km * m
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    if seeds is not None:
        noise = philox_normal(seeds, x.shape, _take(timesteps, row), stream=1, dtype=x.dtype)

    def combination(weights: list[Tensor]) -> Tensor:
        ax, am, a0, *of_slots, az = weights
        out = ax * x + am * m + a0 * x0
        for weight, slot in zip(of_slots, remembered, strict=False):
            out = out + _weighted(weight, slot)
        return out if noise is None else out + _weighted(az, _wide(noise))

    written = [combination(columns[shape.write(i)]) for i in range(shape.writes)]
    return tuple(t.to(dtype) for t in (combination(columns[shape.next]), x0, *written))


def _guided(uncond: Tensor, cond: Tensor, scale: Tensor | float) -> Tensor:
    """Ho & Salimans 2022, eq. 6; a scale of 1 is the conditional output itself."""
    if isinstance(scale, Tensor):
        return torch.where(scale == 1, cond, uncond + scale * (cond - uncond))
    return cond if scale == 1 else uncond + scale * (cond - uncond)


def _weighted(weight: Tensor, term: Tensor) -> Tensor:
    """weight·term; where the weight is 0, what the term is does not matter."""
    return torch.where(weight == 0, 0, weight * term)


def perturb(
    x0: Tensor,
    t: Tensor,
    signal: Tensor,
    sigma: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    learned: int = LEARNED["noise"],
) -> tuple[Tensor, Tensor]:
    """x_t = signal[t]·x0 + sigma[t]·noise; the target: noise, or v = signal[t]·noise - sigma[t]·x0,
    or, where none is learned, an empty tensor.

    Shapes: x0, noise, x_t and the target [B,*]; t and seeds [B] int64; signal, sigma [T+1].
    """
    dtype, x0 = x0.dtype, _wide(x0)
    a, s = (_per_sample(table.to(x0.dtype)[t], x0) for table in (signal, sigma))
    if noise is None:
        noise = philox_normal(seeds, x0.shape, t, stream=2, dtype=x0.dtype)
        noise = torch.zeros_like(x0) + noise  # which then lies as x0 does
    noise = _wide(noise)
    x_t = (a * x0 + s * noise).to(dtype)
    if learned == LEARNED[None]:
        return x_t, x_t.new_empty(0)
    target = a * noise - s * x0 if learned == LEARNED["v"] else noise
    return x_t, target.to(dtype)


def denoising_loss(
    model_output: Tensor,
    t: Tensor,
    of_x0: Tensor,
    of_noise: Tensor,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    delta: float | None = None,
) -> Tensor:
    """[B]: the mean over a sample's elements of the penalty of model_output - target, where
    target = of_x0[t]·x0 + of_noise[t]·noise; a term that is not given is left out.

    Shapes: model_output, x0, noise [B,*]; t and seeds [B] int64; of_x0, of_noise [T+1].
    delta: None is the square of the residual; a number is where Huber's penalty (1964) turns from
    half the square to a straight line.
    """
    residual = _wide(model_output)
    dtype, shape = residual.dtype, model_output.shape
    if x0 is not None:
        residual = residual - _per_sample(of_x0.to(dtype)[t], x0) * _wide(x0)
    if seeds is not None:
        noise = philox_normal(seeds, shape, t, stream=2, dtype=dtype)
    if noise is not None:
        residual = residual - _per_sample(of_noise.to(dtype)[t], noise) * _wide(noise)
    if delta is None:
        penalty = residual.square()
    else:
        slope = residual.clamp(-delta, delta)
        penalty = slope * (residual - 0.5 * slope)
    return penalty.reshape(shape[0], math.prod(shape[1:])).mean(1)


# --- group_norm_act -----------------------------------------------------------------------------


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "silu",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    post_scale: Tensor | None = None,
    post_shift: Tensor | None = None,
    pre_shift: Tensor | None = None,
    normalise: Callable[[Tensor, int, float], Tensor] | None = None,
) -> Tensor:
    """act((1+scale)·GroupNorm(x + pre_shift) + shift)·post_scale + post_shift, x [N,C,*spatial].

    Args: normalise: (x, groups, eps) to x normalised; `normalised`, or torch's for other runtimes,
        whose strides are their own affair.
    """
    dtype, given, x = x.dtype, x, _wide(x)

    def per_channel(p: Tensor) -> Tensor:  # [C] or [N,C] to [1 or N, C, 1...]
        p = p.to(x.dtype)
        return p.reshape((-1, p.shape[-1]) + (1,) * (x.dim() - 2))

    u = x if pre_shift is None else x + per_channel(pre_shift)
    a = (normalise or normalised)(u, num_groups, eps)
    if weight is not None:
        a = a * per_channel(weight)
    if bias is not None:
        a = a + per_channel(bias)
    if scale is not None:
        a = a * (1 + per_channel(scale))
    if shift is not None:
        a = a + per_channel(shift)
    y = ACTIVATIONS[act](a)
    if post_scale is not None:
        y = y * per_channel(post_scale)
    if post_shift is not None:
        y = y + per_channel(post_shift)
    if normalise is None:
        y = in_layout(y, layout_of_norm(given, act != "identity"))
    return y.to(dtype)


def normalised(x: Tensor, num_groups: int, eps: float) -> Tensor:
    """(x - mean)/√(variance + eps) of each group; x [N,C,*spatial]."""
    group = x.reshape(x.shape[0], num_groups, x[0].numel() // num_groups if x.shape[0] else 1)
    # Centred twice: the rounding of a large mean is itself removed, so 10000 +/- 0.1 comes out.
    group = group - group.mean(-1, keepdim=True)
    group = group - group.mean(-1, keepdim=True)
    rstd = torch.rsqrt(group.square().mean(-1, keepdim=True) + eps)
    return (group * rstd).reshape(x.shape)


# --- conv3x3 ------------------------------------------------------------------------------------


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "identity") -> Tensor:
    """act of the convolution of x [B,C,H,W] with weight [K,C,3,3], padding 1, plus bias [K]."""
    return ACTIVATIONS[act](F.conv2d(x, weight, bias, padding=1))


# --- attention ----------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale q k^T + mask) v of heads [B,H,T,d]; 0 of queries to which no key counts."""
    scores = scale * (_wide(q) @ _wide(k).transpose(-1, -2))
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.to(scores.dtype)
    counts = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        counts = counts.tril()
    if mask is not None and mask.dtype == torch.bool:
        counts = counts & mask
    scores = scores.masked_fill(~counts, -math.inf)
    none = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(none, 0).softmax(-1).masked_fill(none, 0)
    return (weights @ _wide(v)).to(q.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    act: str = "identity",
    gated: bool = False,
) -> Tensor:
    """act(x W^T + bias) + residual, of x [*,C] and weight [K,C]; gated: values·act(gates) of the
    halves [values, gates] of x W^T + bias."""
    y = F.linear(x, weight, bias)
    if gated:
        values, gates = y.chunk(2, dim=-1)
        return values * ACTIVATIONS[act](gates)
    y = ACTIVATIONS[act](y)
    return y if residual is None else y + residual
