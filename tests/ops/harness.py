"""What the op tests share: backends, dtypes with their tolerances, every kind of strides."""

from __future__ import annotations

import contextlib
import math
import os
import sys

import torch

from diffusion_ext.ops.backend import missing

# Why the tests do not run on CUDA tensors; empty where they do.
NO_CUDA = missing.get("cuda") or ("" if torch.cuda.is_available() else "no CUDA device")

# What conftest.py runs the tests over.
KERNELS = ("cpu", "cuda")
BACKENDS = (*KERNELS, "reference")
# Those that were asked for; none: all of them.
WANTED = [name for name in os.environ.get("DIFFUSION_EXT_TEST_BACKENDS", "").split(",") if name]

# The backend whose kernels run on the emulated GPU, in a process on the stand-in (tests/stand_in).
EMULATED = ("cuda",) if "stand_in_gpu" in sys.modules else ()

# What the emulated kernels take the device for: multiprocessors, bytes of a block's dynamic shared
# memory, blocks of a cluster. None is as small as the last two, for which little is too large.
DEVICES = {
    "hopper": (132, 228352, 8),
    "ampere": (108, 162816, 1),
    "turing": (40, 61440, 1),
    "tiny": (2, 2048, 1),
    "tiny-with-clusters": (4, 8192, 4),
}


def pretend(seed: int, device: str = "hopper") -> None:
    """The emulated kernels run as on one of DEVICES, their threads in an order of this seed."""
    torch.ops.diffusion_ext.configure(seed, *DEVICES[device])


@contextlib.contextmanager
def waits_are_errors(wanted: bool = True):
    """Where the host waits for the GPU inside, torch raises a RuntimeError."""
    torch.cuda.set_sync_debug_mode("error" if wanted else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Of the largest magnitude of the float64 reference. float32: rounding of a handful of operations;
# half types: half a unit in the last place of the one rounding at the end, and a little.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(TOLERANCE)

# 1 element, odd, a multiple of a block, longer than a tile; 2-D to 5-D.
SHAPES = [(3, 1), (2, 257), (1, 5, 64), (2, 3, 7, 5), (3, 4, 8, 8), (2, 3, 33, 37), (2, 6, 3, 4, 5)]

LAYOUTS = (
    "contiguous",
    "channels_last",
    "misaligned contiguous",
    "misaligned channels_last",
    "transposed",
    "strided",
    "expanded",
)


def lay(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x's values (for "expanded": those of sample 0 throughout) in another layout."""
    if layout.startswith("misaligned "):  # an element past where the allocator would begin
        x = lay(x, layout.removeprefix("misaligned "))
        return x.new_empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)
    if layout == "channels_last":  # of any rank from 3: channels vary fastest
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype=None, factor=1.0) -> float:
    """actual agrees with the float64 reference to the tolerance of its dtype; the largest error."""
    dtype = dtype or actual.dtype
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    assert actual.device == expected.device == torch.empty(0).device, "not on the backend's device"
    if expected.numel() == 0:
        return 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    limit = factor * TOLERANCE[dtype] * max(expected.abs().max().item(), 0.1)
    assert math.isfinite(error), "not finite"
    assert error <= limit, f"error {error:.2e} above {limit:.2e}"
    return error


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
