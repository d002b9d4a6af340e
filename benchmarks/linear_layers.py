"""Linear layers: torch's, oneDNN's of a weight that was reordered before, and ours, in turns.

    python -m benchmarks.linear_layers
    DIFFUSION_EXT_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m benchmarks.linear_layers

Prints docs/convolutions.md's table: thousand million operations a second, of which a product is two
with its sum. (Nothing lowers the instructions of torch's own, which are MKL's.)
"""

from __future__ import annotations

import argparse
import itertools

import torch
from torch.nn import functional as F

from diffusion_ext.ops.linear import linear, linear_filters
from diffusion_ext.ops.measuring import measure

# Rows, channels, outputs: of Stable Diffusion 1.5's UNet at 512 pixels, and of DiT-XL and PixArt.
SHAPES = [
    (8192, 320, 320), (8192, 320, 2560), (8192, 1280, 320), (2048, 640, 640), (2048, 640, 5120),
    (154, 768, 320), (2, 1280, 1280), (512, 1152, 1152), (512, 1152, 4608), (512, 4608, 1152),
]  # fmt: skip


def ways(rows: int, channels: int, out_features: int) -> dict:
    """Name -> what makes its calls."""
    x, bias = torch.randn(rows, channels), torch.randn(out_features)
    weight = torch.randn(out_features, channels) / channels**0.5
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    filters = linear_filters(weight)
    calls = {
        "torch": lambda: F.linear(x, weight, bias),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""),
        "ours": lambda: linear(x, filters, bias, out_features),
    }
    return {name: lambda call=call: itertools.repeat(call) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="of a way's turn, of five")
    seconds = parser.parse_args().seconds
    print("| rows, channels → outputs | threads | torch | oneDNN | ours |\n|---|---|---|---|---|")
    for threads, shape in itertools.product((1, 2), SHAPES):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found = measure(ways(*shape), torch.device("cpu"), seconds)
        rows, channels, out_features = shape
        speeds = (2e-9 * rows * channels * out_features / s for s in found.seconds.values())
        cells = [f"{rows}, {channels} → {out_features}", threads, *(f"{s:.0f}" for s in speeds)]
        print("|", " | ".join(map(str, cells)), "|", found.doubt, flush=True)


if __name__ == "__main__":
    main()
