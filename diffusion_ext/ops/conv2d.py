"""conv2d: convolutions on the CPU of weights that were laid out before, with what follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import CPU_CAPABILITY, NATIVE_DTYPES, kernel, kernels, register_fake, serves
from .group_norm_act import ACTIVATIONS

VECTORISED = CPU_CAPABILITY != "baseline"  # whether the kernels serve at all

CHANNELS = 16  # Winograd's algorithm takes inputs of a multiple of so many channels
TILE = 4  # side of the outputs that it computes together
POINTS, COLUMNS = 36, 32  # numbers of a transformed tile; output channels that lie together

# Nanoseconds on two cores of a Zen 4, by instruction set: of a product and of a byte of the
# filters, and by Winograd's algorithm of a tile's channel too (benchmarks/convolution_costs.py).
DIRECT = {"avx512": (0.0092, 0.0109), "avx2": (0.0100, 0.0124)}
WINOGRAD = {"avx512": (0.0081, 0.0222, 7.2), "avx2": (0.0128, 0.0162, 6.4)}
# Whether it is known where ours gain on torch's. Of NEON it is not: torch's convolutions serve
# there, but for a network that was timed with both on the machine itself (optimize_for_sampling).
TIMED = CPU_CAPABILITY in DIRECT
LIKE = CPU_CAPABILITY if TIMED else "avx2"  # whose figures tell Winograd's way from the direct one


def _shares_of_torch() -> dict[torch.dtype, float]:
    shares, mkldnn = {}, torch.ops.mkldnn
    # A torch without these functions has none of those instructions, as far as is known: bool().
    if getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        shares[torch.bfloat16] = 1 / 16 if amx else 1 / 2
    if hasattr(mkldnn, "_is_mkldnn_fp16_supported") and mkldnn._is_mkldnn_fp16_supported():
        shares[torch.float16] = 1 / 2
    return shares


# Half types that the processor multiplies itself -> what part of float32's time torch's products
# take in them: half of it on a Zen 4, by AVX512_BF16. Ours, which are float32, gain on those by
# Winograd's algorithm, and where there is less to multiply than to lay out, as torch does at each
# call. Without such instructions torch's take 2.7 to 20 times float32's time.
SHARES_OF_TORCH = _shares_of_torch()
LAYING_OUT = 0.18  # nanoseconds that it takes torch, of a number of the weight


def serves_conv2d(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels serve x [B, C, H, W] and a weight: of one of NATIVE_DTYPES on a CPU with
    AVX2, AVX-512 or NEON, x in channels_last. Exported programs, whose sizes may be open, have
    torch's."""
    if not (x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and x.dtype in NATIVE_DTYPES):
        return False
    if x.dim() != 4 or torch.compiler.is_exporting():
        return False
    return (
        VECTORISED
        and serves(x)
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")
    )


def winograd_is_faster(
    batch: int, height: int, width: int, channels: int, out_channels: int
) -> bool:
    """Of a 3x3 filter of stride 1 and padding 1, whose outputs are [batch, K, height, width]."""
    if channels % CHANNELS or not VECTORISED:
        return False
    direct = _direct_time(batch * height * width, 9 * channels, out_channels)
    return _winograd_time(tiles_of(batch, height, width), channels, out_channels) < direct


def gains_on_fast_halves(
    share: float,
    batch: int,
    height: int,
    width: int,
    numbers: int,
    out_channels: int,
    winograd: bool,
) -> bool:
    """Whether ours take less time than torch's of a half type that it multiplies in `share` of
    float32's time.

    Args: batch, height, width: of the outputs. numbers: of a filter. winograd: by its algorithm.
    """
    pixels = batch * height * width
    torchs = numbers * out_channels * (share * DIRECT[LIKE][0] * pixels + LAYING_OUT)
    if winograd:
        return _winograd_time(tiles_of(batch, height, width), numbers // 9, out_channels) < torchs
    return _direct_time(pixels, numbers, out_channels) < torchs


def _direct_time(pixels: int, numbers: int, out_channels: int) -> float:
    product, byte = DIRECT[LIKE]
    return numbers * _computed(out_channels) * (product * pixels + 4 * byte)


def _winograd_time(tiles: int, channels: int, out_channels: int) -> float:
    product, byte, lane = WINOGRAD[LIKE]
    of_filters = POINTS * channels * _computed(out_channels) * (product * tiles + 4 * byte)
    return of_filters + lane * tiles * (channels + out_channels)


def _computed(out_channels: int) -> int:
    """How many output channels are computed for so many."""
    return -(-out_channels // CHANNELS) * CHANNELS


def tiles_of(batch: int, height: int, width: int) -> int:
    return batch * -(-height // TILE) * -(-width // TILE)


def winograd_filters(weight: Tensor) -> Tensor:
    """weight [K, C, 3, 3] as `conv2d` multiplies with it by Winograd's algorithm, and
    [K, C, T, 3, 3] as `conv3d` does: float32 whatever the weight is."""
    return kernels().conv3x3_filters(weight.float())


def direct_filters(weight: Tensor, transposed: bool = False) -> Tensor:
    """weight [K, C, R, S], or a transposed convolution's [C, K, R, S], as `conv2d` wants it, and
    [K, C, T, R, S] as `conv3d` does, of its dtype."""
    return kernels().conv2d_filters(weight, transposed)


def conv2d(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    repeat: int = 1,
    side: int = 1,
    act: str = "identity",
    scale: float = 1.0,
) -> Tensor:
    """scale·(act(convolution(x beside skip, upsampled) + bias) + residual), without gradients.

    Half precision is computed in float32 and rounded once, at the end.

    Args:
        x: [B, C1, H, W], which `serves_conv2d`. skip: [B, C2, H, W] or None, further channels,
            which are read where they lie.
        filters: what `winograd_filters` (stride 1, padding 1) or `direct_filters` made of the
            weight, of C1 + C2 channels. bias: [K] or None. out_channels: K.
        repeat: how many times each pixel is read in both directions: nearest upsampling.
        side: of a transposed convolution's filters, which is its stride; else 1.
        residual: of the outputs' shape, or None. act: one of group_norm_act's.

    All but Winograd's filters is of one dtype.

    Returns: [B, K, H', W'], channels_last.
    """
    op = kernels().conv2d if torch.compiler.is_compiling() else kernel("conv2d")
    return op(
        x, skip, filters, bias, residual, out_channels, *stride, *padding, repeat, side,
        ACTIVATIONS.index(act), scale,
    )  # fmt: skip


@register_fake("conv3x3_filters")
def _(weight):
    out_channels, channels, *frames = weight.shape[:-2]
    return weight.new_empty(-(-out_channels // COLUMNS), POINTS, *frames, channels, COLUMNS)


@register_fake("conv2d_filters")
def _(weight, transposed):
    out_channels, channels, *sides = weight.shape
    if transposed:
        rows, columns = sides
        blocks = rows * columns * -(-channels // COLUMNS)
        return weight.new_empty(blocks, 1, 1, out_channels, COLUMNS)
    return weight.new_empty(-(-out_channels // COLUMNS), *sides, channels, COLUMNS)


@register_fake("conv2d")
def _(
    x, skip, filters, bias, residual, out_channels,
    stride_high, stride_wide, padding_high, padding_wide, repeat, side, act, scale,
):  # fmt: skip
    batch, _, height, width = x.shape
    rows, columns = filters.shape[1:3] if filters.dim() == 5 else (3, 3)
    height = (height * repeat + 2 * padding_high - rows) // stride_high + 1
    width = (width * repeat + 2 * padding_wide - columns) // stride_wide + 1
    return x.new_empty(batch, height * side, width * side, out_channels).permute(0, 3, 1, 2)
