"""Attention alone: torch's, OpenVINO's, ONNX Runtime's and ours, in turns.

    python -m benchmarks.attention --threads 1
    DIFFUSION_EXT_CPU_CAPABILITY=avx2 python -m benchmarks.attention --threads 1

Prints docs/attention.md's table: milliseconds a call, of float32. The second command lowers ours to
AVX2 and leaves the others what the processor has.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diffusion_ext as dx
from diffusion_ext.ops.measuring import measure
from diffusion_ext.sampling.exports import exported

RUNTIMES = "openvino", "onnxruntime"

# B, H, queries, keys, d: of Stable Diffusion 1.5's UNet, DiT-XL/2, Flux, Stable Diffusion 3, a UNet
# of heads of 8.
SHAPES = [
    (2, 8, 4096, 4096, 40), (2, 8, 4096, 77, 40), (2, 8, 1024, 1024, 80), (2, 16, 256, 256, 72),
    (1, 24, 1280, 1280, 128), (1, 8, 1178, 1178, 64), (1, 4, 1024, 1024, 8),
]  # fmt: skip


class Attention(nn.Module):
    """torch's, of q, k, v [B, H, T, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


def ways(batch: int, heads: int, queries: int, keys: int, size: int) -> dict:
    """Name -> what makes its calls, of heads that lie as [B, T, H, d]."""
    lengths = (queries, keys, keys)
    heads_of = [torch.randn(batch, length, heads, size).transpose(1, 2) for length in lengths]
    calls = {"torch": Attention(), "ours": dx.attention}
    calls |= {name: exported(name, Attention(), tuple(heads_of)) for name in RUNTIMES}
    return {
        name: lambda call=call: itertools.repeat(lambda: call(*heads_of))
        for name, call in calls.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1, help="of a way's turn, of five")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ["torch", *RUNTIMES, "ours"]
    print(f"| B, H, queries × keys, d | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for shape in SHAPES:
        with torch.no_grad():
            found = measure(ways(*shape), torch.device("cpu"), options.seconds)
        batch, heads, queries, keys, size = shape
        cells = [f"{batch}, {heads}, {queries}×{keys}, {size}"]
        cells += [f"{1e3 * found.seconds[name]:.3g}" for name in names]
        print("|", " | ".join(cells), "|", found.doubt, flush=True)


if __name__ == "__main__":
    main()
